"""AkiProcessor: questions and images to what the model reads, answers and captions to what it is trained on.

Source: prompt format, image transform and label rules of AKI (arXiv 2503.02597) and its released checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from mmkernels.errors import ConfigError, DataError
from mmkernels.models.aki.configuration_aki import AkiConfig
from mmkernels.models.common.images import load_image
from mmkernels.models.common.word_tokenizer import check_words
from mmkernels.ops.mma_attention.spans import IGNORED

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = ("system", "user", "assistant")
Turns = Sequence[dict[str, str]]


def image_to_pixels(source: Any, size: int = 384, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """An image to (3, size, size) float32: resized without keeping its aspect (bicubic, antialiased), normalised.

    Args:
        source: anything `load_image` reads.
        size: pixels along a side.
        mean, std: of every channel, for values in [0, 1].

    Raises:
        DataError: unreadable images.
    """
    image = load_image(source).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
    return torch.from_numpy((pixels - mean) / std)


def expand_placeholders(ids: Sequence[int], image_token_id: int, num_vision_tokens: int) -> list[int]:
    """Token ids with each placeholder repeated, so that ids, labels and masks count what attention counts.

    >>> expand_placeholders([1, 9, 5], image_token_id=9, num_vision_tokens=3)
    [1, 9, 9, 9, 5]
    """
    return [i for token in ids for i in [token] * (num_vision_tokens if token == image_token_id else 1)]


class AkiProcessor(ProcessorMixin):
    """Tokenizer, image transform, prompt format and label rules in one object.

    Args:
        tokenizer: of transformers, with the special tokens below; use the one of the checkpoint.  Spaces and newlines
            after special tokens are its business (Phi-3's drops them).
        image_size, image_mean, image_std: see `image_to_pixels`.
        num_vision_tokens: image tokens of one image.
        system_message: text of the system turn; None leaves the turn out.
        image_token, chunk_token, assistant_token: the special words of the format.
        chat: False writes no turns, only "<image> question <|assistant|>" (models with small word vocabularies).

    Raises:
        ConfigError: a special token that the tokenizer does not have.

    Example:
        >>> processor = AkiProcessor.from_pretrained(folder)  # doctest: +SKIP
        >>> inputs = processor("What is shown?", images="photo.jpg")  # doctest: +SKIP
        >>> model.generate(**inputs, max_new_tokens=32)  # doctest: +SKIP
    """

    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 384,
        image_mean: float = 0.5,
        image_std: float = 0.5,
        num_vision_tokens: int = 144,
        system_message: str | None = SYSTEM,
        image_token: str = "<image>",
        chunk_token: str = "<|endofchunk|>",
        assistant_token: str = "<|assistant|>",
        chat: bool = True,
        chat_template: str | None = None,
    ):
        vocab = tokenizer.get_vocab()
        for name, token in (("image", image_token), ("chunk", chunk_token), ("assistant", assistant_token)):
            if token not in vocab:
                raise ConfigError(
                    f"AkiProcessor: {name}_token must be a word of the tokenizer; got {token!r}. Use the checkpoint's "
                    "tokenizer, or add it with tokenizer.add_special_tokens."
                )
        if tokenizer.pad_token is None or tokenizer.eos_token is None:
            raise ConfigError(
                "AkiProcessor: tokenizer must have a padding and an end token; got none for "
                f"{'padding' if tokenizer.pad_token is None else 'the end'}. AKI's are '<pad>' and '<|endoftext|>'."
            )
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_size, self.image_mean, self.image_std = image_size, image_mean, image_std
        self.num_vision_tokens, self.system_message, self.chat = num_vision_tokens, system_message, chat
        self.image_token, self.chunk_token, self.assistant_token = image_token, chunk_token, assistant_token

    @classmethod
    def from_config(cls, tokenizer: Any, config: AkiConfig, **settings: Any) -> "AkiProcessor":
        """A processor whose sizes and special tokens are those of a model; `settings` as in the constructor."""
        sizes = {
            "image_size": config.vision_config.image_size,
            "num_vision_tokens": config.num_vision_tokens,
            "image_token": tokenizer.convert_ids_to_tokens(config.image_token_id),
            "assistant_token": tokenizer.convert_ids_to_tokens(config.prompt_end_token_id),
        }
        return cls(tokenizer, **{**sizes, **settings})

    def render(self, question: str | Turns, num_images: int = 0) -> str:
        """The prompt as text, one image token per image, ending in the assistant tag.

        Args:
            question: a question, or turns {"role": "system" | "user" | "assistant", "content": text}.
            num_images: how many there are; where no place is marked they go in front of the first user turn's text.

        Raises:
            DataError: marked places and images differ in number; no turn, an unknown role, an assistant tag in a text.
        """
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else [dict(t) for t in question]
        if not turns or any(turn.get("role") not in ROLES or "content" not in turn for turn in turns):
            raise DataError(
                f"AkiProcessor: text must be a question or turns with a role of {ROLES} and content; got {question!r}. "
                'Write {"role": "user", "content": ...}.'
            )
        if any(self.assistant_token in turn["content"] for turn in turns):
            raise DataError(
                f"AkiProcessor: text must not hold {self.assistant_token!r}, which ends what images read; got "
                f"{question!r}. Give earlier answers as turns."
            )
        marked = sum(turn["content"].count(self.image_token) for turn in turns)
        users = [turn for turn in turns if turn["role"] == "user"]
        if not marked and num_images and users:
            users[0]["content"] = f"{self.image_token}\n" * num_images + users[0]["content"]
            marked = num_images
        if marked != num_images:
            raise DataError(
                f"AkiProcessor: text must mark as many images as are given; got {marked} {self.image_token!r} and "
                f"{num_images} images. Mark each place, or none to have them placed."
            )
        if not self.chat:
            return " ".join([*(turn["content"] for turn in turns), self.assistant_token])
        if self.system_message is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_message})
        prompt = "".join(f"<|{turn['role']}|>\n{turn['content']}<|end|>\n" for turn in turns)
        return f"{self.tokenizer.bos_token or ''} {prompt}{self.assistant_token}\n"

    def __call__(
        self, text: Any = None, images: Any = None, *, max_length: int | None = None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Prompts for `generate`.

        Args:
            text: a question or a conversation (list of turns), or a list of either for a batch.
            images: for one text: an image or a list of images; for a batch: one such entry (or None) per text.
            max_length: refuse longer rows; a prompt is never cut.
            return_tensors: only "pt".

        Returns:
            input_ids, attention_mask (batch, seqlen), padded on the left, num_vision_tokens placeholders for each
            image; pixel_values (images, 3, image_size, image_size) when there are images, in order.

        Raises:
            DataError: unreadable images, images and places that differ in number, unknown words, rows too long.
        """
        if return_tensors != "pt":
            raise ConfigError(f"AkiProcessor: return_tensors must be 'pt'; got {return_tensors!r}. Leave it out.")
        texts, sources = _as_batch(text, images)
        rows = [self._tokens(self.render(t, len(own)), len(own)) for t, own in zip(texts, sources, strict=True)]
        longest = max(map(len, rows))
        if max_length is not None and longest > max_length:
            raise DataError(
                f"AkiProcessor: rows must have at most max_length = {max_length} tokens; got {longest}. Shorten the "
                "text or give fewer images."
            )
        return self._batch(rows, None, sources, side="left")

    def for_sft(
        self, text: Any, answers: Any, images: Any = None, *, max_text_tokens: int | None = None
    ) -> BatchFeature:
        """Prompts with their answers, and labels on what follows the last assistant tag, the end token included.

        Args:
            text, images: as for a call.
            answers: one text for each prompt.
            max_text_tokens: longer rows lose the end of the answer; an image counts as one token (AKI used 512).

        Returns:
            As a call, padded on the right, with labels (batch, seqlen), -100 where there is no loss.

        Raises:
            DataError: as a call; a prompt that leaves no room for its answer.
        """
        texts, sources = _as_batch(text, images)
        replies = [answers] if isinstance(answers, str) else list(answers)
        if len(replies) != len(texts):
            raise DataError(f"AkiProcessor: answers must be one per text ({len(texts)}); got {len(replies)}.")
        rows, labels = [], []
        for prompt, reply, own in zip(texts, replies, sources, strict=True):
            ids = self._tokens(self.render(prompt, len(own)) + self._plain(reply), len(own), expand=False)
            ids = [*ids, self.tokenizer.eos_token_id][:max_text_tokens]
            tag = self._id(self.assistant_token)
            start = len(ids) - ids[::-1].index(tag) if tag in ids else len(ids)
            if start == len(ids) or ids.count(self._id(self.image_token)) != len(own):
                raise DataError(
                    f"AkiProcessor: max_text_tokens must leave room for an answer; got {max_text_tokens} for "
                    f"{prompt!r}. Raise it or leave the sample out."
                )
            ends = len(self._expand(ids[:start]))
            rows.append(self._expand(ids))
            labels.append([IGNORED] * ends + rows[-1][ends:])
        return self._batch(rows, labels, sources, side="right")

    def for_pretraining(self, captions: Any, images: Any = None, *, max_text_tokens: int | None = None) -> BatchFeature:
        """Captions behind their images, with labels on all text: without a question, attention stays causal.

        Args:
            captions: one text, or a list.
            images: as for a call; placed in front of the caption.
            max_text_tokens: longer captions lose their end; an image counts as one token (AKI used 128).

        Returns:
            As `for_sft`; the row is bos, images, caption, `chunk_token`, eos.  Labels are on everything but images.
        """
        texts, sources = _as_batch(captions, images)
        rows, labels, place = [], [], self._id(self.image_token)
        for caption, own in zip(texts, sources, strict=True):
            text = f"{self.image_token * len(own)}{self._plain(caption)} {self.chunk_token}"
            ids = self._tokens(text, len(own), expand=False)
            bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
            ids = [*bos, *ids, self.tokenizer.eos_token_id][:max_text_tokens]
            if ids.count(place) != len(own):
                raise DataError(
                    f"AkiProcessor: max_text_tokens must leave room for a caption; got {max_text_tokens} for "
                    f"{len(own)} images. Raise it."
                )
            rows.append(self._expand(ids))
            labels.append([IGNORED if token == place else token for token in rows[-1]])
        return self._batch(rows, labels, sources, side="right")

    def _plain(self, text: str) -> str:
        for token in (self.image_token, self.chunk_token, self.assistant_token):
            if token in text:
                raise DataError(f"AkiProcessor: answers and captions must not hold {token!r}; got {text!r}. Remove it.")
        return text

    def _id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def _expand(self, ids: Sequence[int]) -> list[int]:
        return expand_placeholders(ids, self._id(self.image_token), self.num_vision_tokens)

    def _tokens(self, text: str, num_images: int, expand: bool = True) -> list[int]:
        check_words(self.tokenizer, text, (self.image_token, self.chunk_token, self.assistant_token))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = ids.count(self._id(self.image_token))
        if found != num_images:
            raise DataError(
                f"AkiProcessor: a text must mark as many images as are given; got {found} {self.image_token!r} and "
                f"{num_images} images. Is it a special token of the tokenizer?"
            )
        return self._expand(ids) if expand else ids

    def _batch(
        self, rows: list[list[int]], labels: list[list[int]] | None, sources: list[list[Any]], side: str
    ) -> BatchFeature:
        width = max(map(len, rows))

        def pad(lists: list[list[int]], value: int) -> Tensor:
            fills = [[value] * (width - len(own)) for own in lists]
            pairs = zip(lists, fills, strict=True)
            return torch.tensor([fill + own if side == "left" else own + fill for own, fill in pairs])

        data = {
            "input_ids": pad(rows, int(self.tokenizer.pad_token_id)),
            "attention_mask": pad([[1] * len(row) for row in rows], 0),
        }
        if labels is not None:
            data["labels"] = pad(labels, IGNORED)
        flat = [source for own in sources for source in own]
        if flat:
            data["pixel_values"] = torch.stack(
                [image_to_pixels(source, self.image_size, self.image_mean, self.image_std) for source in flat]
            )
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        """The keys a call may return."""
        return ["input_ids", "attention_mask", "pixel_values"]


def _as_batch(text: Any, images: Any) -> tuple[list[Any], list[list[Any]]]:
    """Texts and, for each, its list of images."""
    if text is None or (isinstance(text, list | tuple) and not text):
        raise DataError("AkiProcessor: text must be a question or a conversation; got none. Pass text=.")
    single = isinstance(text, str) or (isinstance(text, list | tuple) and isinstance(text[0], dict))
    texts = [text] if single else list(text)
    if images is None:
        return texts, [[] for _ in texts]
    entries = [images] if single else images
    if not isinstance(entries, list | tuple) or len(entries) != len(texts):
        count = len(entries) if isinstance(entries, list | tuple) else 1
        raise DataError(
            f"AkiProcessor: images must have one entry per text ({len(texts)}); got {count}. Use None for a text "
            "without image and a list for several."
        )
    return texts, [[] if e is None else list(e) if isinstance(e, list | tuple) else [e] for e in entries]
