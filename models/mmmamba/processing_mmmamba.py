"""MMMambaProcessor: questions and images to what the model reads; also the prompt format of the released chat models.

Source: the InternLM2 chat template as mmMamba uses it (arXiv 2502.13145 and its released checkpoints' settings).
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from mmkernels.errors import ConfigError, DataError, nearest
from mmkernels.models.common.word_tokenizer import check_words
from mmkernels.models.mmmamba.configuration_mmmamba import MMMambaConfig
from mmkernels.models.mmmamba.tiling_mmmamba import IMAGENET_MEAN, IMAGENET_STD, ImageTiler

MARKER = "<image>"
ORDERS = ("image_first", "question_first")
ROLES = ("system", "user", "assistant")
Message = dict[str, Any]


class MMMambaProcessor(ProcessorMixin):
    """Tokenizer, image tiler and prompt format in one object.

    Args:
        tokenizer: of transformers; it is made to pad on the left.
        tile_size, patch_size, downsample_ratio: the model's; they fix the number of image tokens per tile.
        min_tiles, max_tiles, use_thumbnail, image_mean, image_std: see `ImageTiler`.
        system_message: text of the system turn; None leaves the turn out.  The released checkpoints were trained with
            the line in their own conversation file: pass that.
        prompt_order: where images go when the text does not mark a place with "<image>".
        chat: False writes no turns at all, only the question and its images (models with small word vocabularies).
        image_token: the word that stands for one image token.
        image_start_token, image_end_token: written around the tokens of one image; None = nothing.

    Raises:
        ConfigError: an unknown order, or an image token that the tokenizer does not have.

    Example:
        >>> processor = MMMambaProcessor.from_pretrained(folder)  # doctest: +SKIP
        >>> inputs = processor("What is shown?", images="photo.jpg")  # doctest: +SKIP
        >>> model.generate(**inputs, max_new_tokens=32)  # doctest: +SKIP
    """

    def __init__(
        self,
        tokenizer: Any,
        tile_size: int = 448,
        patch_size: int = 14,
        downsample_ratio: float = 0.5,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        system_message: str | None = None,
        prompt_order: str = "image_first",
        chat: bool = True,
        image_token: str = "<IMG_CONTEXT>",
        image_start_token: str | None = "<img>",
        image_end_token: str | None = "</img>",
        chat_template: str | None = None,
    ):
        if prompt_order not in ORDERS:
            raise ConfigError(
                f"MMMambaProcessor: prompt_order must be known; got {prompt_order!r}. {nearest(prompt_order, ORDERS)}"
            )
        if image_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"MMMambaProcessor: image_token must be a word of the tokenizer; got {image_token!r}. Name the one "
                "that stands for an image token, or add it with tokenizer.add_tokens."
            )
        super().__init__(tokenizer, chat_template=chat_template)
        tokenizer.padding_side = "left"
        self.tile_size, self.patch_size, self.downsample_ratio = tile_size, patch_size, downsample_ratio
        self.min_tiles, self.max_tiles, self.use_thumbnail = min_tiles, max_tiles, use_thumbnail
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.system_message, self.prompt_order, self.chat = system_message, prompt_order, chat
        self.image_token = image_token
        self.image_start_token, self.image_end_token = image_start_token, image_end_token
        self.tiler.candidates()  # refuses impossible settings now rather than at the first image

    @classmethod
    def from_config(cls, tokenizer: Any, config: MMMambaConfig, **settings: Any) -> "MMMambaProcessor":
        """A processor whose sizes and image token are those of a model; `settings` as in the constructor."""
        sizes = {
            "tile_size": config.image_size,
            "patch_size": config.patch_size,
            "downsample_ratio": config.downsample_ratio,
            "image_token": tokenizer.convert_ids_to_tokens(config.image_token_id),
        }
        return cls(tokenizer, **{**sizes, **settings})

    @property
    def tiler(self) -> ImageTiler:
        """The image tiler with this processor's settings."""
        return ImageTiler(
            self.tile_size,
            self.min_tiles,
            self.max_tiles,
            self.use_thumbnail,
            tuple(self.image_mean),
            tuple(self.image_std),
        )

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile."""
        return (self.tile_size // self.patch_size // round(1 / self.downsample_ratio)) ** 2

    def render(self, messages: str | Sequence[Message], num_images: int | None = None) -> str:
        """The prompt as text, one "<image>" per image.

        Args:
            messages: a question, or turns {"role": "system" | "user" | "assistant", "content": text or parts}; a part
                is {"type": "text", "text": ...} or {"type": "image"}.  The answer is asked for unless the last turn is
                the assistant's.
            num_images: how many there are (None: as many as marked); unmarked, they go into the first user turn.

        Returns:
            Text; `__call__` replaces each "<image>" by that image's tokens.

        Raises:
            DataError: marked places and images differ in number, or a role or part is unknown.
        """
        said: Sequence[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        turns = [(_role(turn), _content(turn.get("content", ""))) for turn in said]
        marked = sum(text.count(MARKER) for _, text in turns)
        given = marked if num_images is None else num_images
        users = [i for i, (role, _) in enumerate(turns) if role == "user"]
        if given and not marked and users:
            turns[users[0]] = ("user", self._place(turns[users[0]][1], given))
            marked = given
        if marked != given:
            raise DataError(
                f"MMMambaProcessor: the text must mark as many images as are given; got {marked} '{MARKER}' and "
                f"{given} images. Mark each place, or none to have them placed."
            )
        if not self.chat:
            return " ".join(text for _, text in turns)
        if self.system_message is not None and (not turns or turns[0][0] != "system"):
            turns.insert(0, ("system", self.system_message))
        prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns)
        return prompt if turns and turns[-1][0] == "assistant" else f"{prompt}<|im_start|>assistant\n"

    def _place(self, question: str, images: int) -> str:
        if not self.chat:
            marks = " ".join([MARKER] * images)
            if self.prompt_order == "image_first":
                return f"{marks} {question}"
            # the question mark stays last: it is where the answer is read
            body = question.rstrip()
            return f"{body[:-1].rstrip()} {marks} ?" if body.endswith("?") else f"{body} {marks}"
        lines = [MARKER] if images == 1 else [f"Image-{k + 1}: {MARKER}" for k in range(images)]
        block = "\n".join(lines)
        return f"{block}\n{question}" if self.prompt_order == "image_first" else f"{question}\n{block}"

    def expand(self, prompt: str, tiles: Sequence[int]) -> str:
        """Replace the k-th "<image>" by start token, tiles[k] x tokens_per_tile image tokens, end token."""
        counts = iter(tiles)
        start, end = self.image_start_token or "", self.image_end_token or ""

        def span(_: re.Match[str]) -> str:
            return f"{start}{self.image_token * (self.tokens_per_tile * next(counts))}{end}"

        return re.sub(re.escape(MARKER), span, prompt)

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        *,
        max_tiles: int | None = None,
        max_length: int | None = None,
        return_image_counts: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Tokenize questions or conversations, tile their images.

        Args:
            text: a question, a conversation (list of turns), or a list of either for a batch.
            images: for one text: an image or a list of images; for a batch: one such entry (or None) per text.
                Anything `load_image` reads.
            max_tiles: overrides the processor's for this call.  Several images of one text share it.
            max_length: refuse longer rows; nothing is ever cut, a cut prompt would lose image tokens.
            return_image_counts: also return image_counts (batch,), the tiles of each row.
            return_tensors: only "pt".

        Returns:
            input_ids, attention_mask, mm_token_type_ids (batch, seqlen), padding left; pixel_values (tiles, 3,
            tile_size, tile_size) when there are images, all rows' tiles in order.

        Raises:
            DataError: unreadable images, images and places that differ in number, unknown words, rows too long.
        """
        if return_tensors != "pt":
            raise ConfigError(f"MMMambaProcessor: return_tensors must be 'pt'; got {return_tensors!r}. Leave it out.")
        texts, image_lists = _as_batch(text, images)
        tiler = self.tiler
        prompts, tiles = [], []
        for entry, sources in zip(texts, image_lists, strict=True):
            if max_tiles is None:
                share = tiler.budget(len(sources))
            else:
                share = max(1, max_tiles // max(len(sources), 1))
            cut = [tiler(source, share) for source in sources]
            prompt = self.render(entry, len(sources))
            check_words(self.tokenizer, prompt, (MARKER,))
            prompts.append(self.expand(prompt, [len(part) for part in cut]))
            tiles.append(cut)
        counts = [sum(len(part) for part in cut) for cut in tiles]
        data = self._tokenize(prompts, counts, max_length)
        if any(counts):
            data["pixel_values"] = torch.cat([part for cut in tiles for part in cut])
        if return_image_counts:
            data["image_counts"] = torch.tensor(counts)
        return BatchFeature(data)

    def _tokenize(self, prompts: list[str], counts: list[int], max_length: int | None) -> dict[str, torch.Tensor]:
        if len(prompts) > 1 and self.tokenizer.pad_token is None:
            raise DataError(
                "MMMambaProcessor: a batch needs a padding token; got a tokenizer without one. "
                "Set tokenizer.pad_token = tokenizer.eos_token."
            )
        encoded = self.tokenizer(prompts, padding=len(prompts) > 1, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        image = (ids == self.tokenizer.convert_tokens_to_ids(self.image_token)).long()
        for row, (found, tiles) in enumerate(zip(image.sum(-1).tolist(), counts, strict=True)):
            if found != tiles * self.tokens_per_tile:
                raise DataError(
                    f"MMMambaProcessor: text {row} must hold {tiles * self.tokens_per_tile} image tokens; got {found}. "
                    f"Mark images with '{MARKER}' and keep '{self.image_token}' out of the text."
                )
        if max_length is not None and ids.shape[1] > max_length:
            raise DataError(
                f"MMMambaProcessor: rows must have at most max_length = {max_length} tokens; got {ids.shape[1]}. "
                "Lower max_tiles or shorten the text."
            )
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": image}

    @property
    def model_input_names(self) -> list[str]:
        """The keys a call may return."""
        return ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"]


def _role(turn: Message) -> str:
    role = turn.get("role") if isinstance(turn, dict) else None
    if role not in ROLES:
        raise DataError(
            f"MMMambaProcessor: a turn must be a dict whose role is one of {ROLES}; got {turn!r}. "
            'Write {"role": "user", "content": ...}.'
        )
    return str(role)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    words = []
    for part in content if isinstance(content, list | tuple) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            words.append(str(part["text"]))
        elif kind == "image":
            words.append(f"{MARKER}\n")
        else:
            raise DataError(
                f"MMMambaProcessor: content must be text or parts of type 'text' or 'image'; got {part!r}. "
                "Pass the pictures themselves as images."
            )
    return "".join(words)


def _as_batch(text: Any, images: Any) -> tuple[list[Any], list[list[Any]]]:
    """Texts and, for each, its list of images."""
    if text is None or (isinstance(text, list | tuple) and not text):
        raise DataError("MMMambaProcessor: text must be a question or a conversation; got none. Pass text=.")
    single = isinstance(text, str) or (isinstance(text, list | tuple) and isinstance(text[0], dict))
    texts = [text] if single else list(text)
    if images is None:
        return texts, [[] for _ in texts]
    entries = [images] if single else images
    if not isinstance(entries, list | tuple) or len(entries) != len(texts):
        count = len(entries) if isinstance(entries, list | tuple) else 1
        raise DataError(
            f"MMMambaProcessor: images must have one entry per text ({len(texts)}); got {count}. "
            "Use None for a text without image and a list for several."
        )
    return texts, [[] if e is None else list(e) if isinstance(e, list | tuple) else [e] for e in entries]
