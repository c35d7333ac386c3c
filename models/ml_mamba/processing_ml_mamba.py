"""MLMambaProcessor: conversations and images to what the model reads, and to what it is trained on.

Source: prompt template, image transforms and label rules of ML-Mamba's released code (arXiv 2407.19832).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from mmkernels.errors import ConfigError, DataError, nearest
from mmkernels.models.common.images import load_image
from mmkernels.models.common.word_tokenizer import check_words
from mmkernels.models.ml_mamba.configuration_ml_mamba import MLMambaConfig
from mmkernels.models.ml_mamba.vision_ml_mamba import HALF, IMAGENET, NORMALISATION

IGNORED = -100
IMAGE_MARK = "<image>"  # of the public training files: deleted, since the image has no place in the text
STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
Turns = Sequence[dict[str, str]]


def zephyr_turn(role: str, text: str, index: int, eos: str) -> str:
    r"""One turn of the template, number `index` of its conversation, from 0.

    >>> zephyr_turn("user", "Hi <image>", 0, "<|endoftext|>")
    '<|user|>\nHi<|endoftext|>\n<|assistant|>\n'
    >>> zephyr_turn("assistant", "", 1, "<|endoftext|>"), zephyr_turn("user", "So?", 2, "</s>")
    (' <|endoftext|>', '\n<|user|>\nSo?</s>\n<|assistant|>\n')
    """
    text = text.replace(IMAGE_MARK, "").strip()
    if role == "assistant":
        return f"{text or ' '}{eos}"
    return f"{chr(10) if index else ''}<|user|>\n{text}{eos}\n<|assistant|>\n"


def image_to_tower(
    source: Any, size: int, mean: Sequence[float], std: Sequence[float], strategy: str = STRATEGIES[0]
) -> Tensor:
    """An image to one tower's (channels, size, size) float32, bicubic and antialiased, normalised.

    Args:
        source: anything `load_image` reads.
        size: pixels of a side.
        mean, std: of each channel, for values in [0, 1]; one channel makes the image grey.
        strategy: "resize-naive" does not keep the aspect; "resize-crop" keeps it and cuts the longer side's ends off;
            "letterbox" keeps it and fills up to a square with the mean colour.

    Raises:
        DataError: unreadable images.
    """
    image = load_image(source)
    if len(mean) == 1:
        image = image.convert("L")
    if strategy == "letterbox":
        side = max(image.size)
        colour = tuple(int(255 * value) for value in mean)
        square = Image.new(image.mode, (side, side), colour if len(colour) > 1 else colour[0])
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if strategy == "resize-crop":
        scale = size / min(image.size)
        width, height = (max(size, round(edge * scale)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32).reshape(size, size, -1).transpose(2, 0, 1) / 255
    centre, scaled = (np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (mean, std))
    return torch.from_numpy((pixels - centre) / scaled)


class MLMambaProcessor(ProcessorMixin):
    """Tokenizer, a transform for each tower, the Zephyr template and label rules in one object.

    Args:
        tokenizer: of transformers, with an end token; the released model's is GPT-NeoX's, whose end also pads.
        image_size: pixels of a side.
        image_mean, image_std: of every tower, three numbers each, for values in [0, 1].
        strategy: see `image_to_tower`.

    Raises:
        ConfigError: an unknown strategy, a tokenizer without an end token, means and deviations that differ in number.

    Example:
        >>> processor = MLMambaProcessor.from_pretrained(folder)  # doctest: +SKIP
        >>> inputs = processor("What is shown?", images="photo.jpg")  # doctest: +SKIP
        >>> model.generate(**inputs, max_new_tokens=32)  # doctest: +SKIP
    """

    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 384,
        image_mean: Sequence[Sequence[float]] = (IMAGENET[0], HALF[0]),
        image_std: Sequence[Sequence[float]] = (IMAGENET[1], HALF[1]),
        strategy: str = STRATEGIES[0],
        chat_template: str | None = None,
    ):
        if strategy not in STRATEGIES:
            raise ConfigError(
                f"MLMambaProcessor: strategy must be known; got {strategy!r}. {nearest(strategy, STRATEGIES)}"
            )
        if tokenizer.eos_token is None:
            raise ConfigError(
                "MLMambaProcessor: tokenizer must have an end token; got none. GPT-NeoX's is '<|endoftext|>'."
            )
        if len(image_mean) != len(image_std) or not image_mean:
            raise ConfigError(
                "MLMambaProcessor: image_mean and image_std must have one entry per tower; got "
                f"{len(image_mean)} and {len(image_std)}."
            )
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_size, self.strategy = image_size, strategy
        self.image_mean, self.image_std = [list(m) for m in image_mean], [list(s) for s in image_std]

    @classmethod
    def from_config(cls, tokenizer: Any, config: MLMambaConfig, **settings: Any) -> "MLMambaProcessor":
        """A processor whose size and normalisations are those of a model's towers; `settings` as in the constructor."""
        norms = [NORMALISATION[tower.model_type] for tower in config.towers]
        channels = [int(tower.num_channels) for tower in config.towers]
        sizes = {
            "image_size": config.image_size,
            "image_mean": [mean[:n] for (mean, _), n in zip(norms, channels, strict=True)],
            "image_std": [std[:n] for (_, std), n in zip(norms, channels, strict=True)],
        }
        return cls(tokenizer, **{**sizes, **settings})

    def render(self, question: str | Turns) -> list[str]:
        """The turns of a prompt as text, each to be tokenised by itself; the last ends where the answer starts.

        Args:
            question: a question, or turns {"role": "user" | "assistant", "content": text}, alternating.

        Raises:
            DataError: no turn, an unknown role, turns that do not alternate or do not start with the user's.
        """
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        roles = [turn.get("role") for turn in turns if isinstance(turn, dict)]
        expected = ["user", "assistant"] * len(turns)
        if not turns or roles != expected[: len(turns)] or any("content" not in turn for turn in turns):
            raise DataError(
                "MLMambaProcessor: text must be a question or turns of user and assistant, alternating and with "
                f"content; got {question!r}. There is no system turn in this template."
            )
        eos = self.tokenizer.eos_token
        return [zephyr_turn(turn["role"], turn["content"], index, eos) for index, turn in enumerate(turns)]

    def __call__(
        self, text: Any = None, images: Any = None, *, max_length: int | None = None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Prompts for `generate`.

        Args:
            text: a question or a conversation (list of turns, the last the user's), or a list of either for a batch.
            images: one image, or for a batch one per text, None where there is none.
            max_length: refuse longer texts; a prompt is never cut.
            return_tensors: only "pt".

        Returns:
            input_ids, attention_mask (batch, seqlen), text only, padded on the left; with images pixel_values (batch,
            towers, channels, size, size), zeros for texts without one, and has_image (batch,) bool.

        Raises:
            DataError: unreadable images, more than one for a text, unknown words, texts too long.
        """
        if return_tensors != "pt":
            raise ConfigError(f"MLMambaProcessor: return_tensors must be 'pt'; got {return_tensors!r}. Leave it out.")
        texts, sources = _as_batch(text, images)
        rows = []
        for prompt in texts:
            turns = self.render(prompt)
            if len(turns) % 2 == 0:
                raise DataError(f"MLMambaProcessor: a prompt must end with the user's turn; got {prompt!r}.")
            rows.append([token for turn in turns for token in self._tokens(turn)])
        longest = max(map(len, rows))
        if max_length is not None and longest > max_length:
            raise DataError(
                f"MLMambaProcessor: texts must have at most max_length = {max_length} tokens; got {longest}. Shorten "
                "the text."
            )
        return self._batch(rows, None, sources, side="left")

    def for_sft(
        self, text: Any, answers: Any = None, images: Any = None, *, max_text_tokens: int | None = 2048
    ) -> BatchFeature:
        """Conversations with labels on every answer, its end token included.

        Args:
            text: as for a call; a conversation that ends with the assistant's turn needs no answer.
            answers: one text for each prompt that ends with the user's turn; None: all are whole conversations.
            images: as for a call.
            max_text_tokens: longer texts lose their end; the image does not count.

        Returns:
            As a call, padded on the right, with labels (batch, seqlen), -100 where there is no loss.

        Raises:
            DataError: as a call; a text that leaves nothing to be learned.
        """
        texts, sources = _as_batch(text, images)
        replies = [None] * len(texts) if answers is None else [answers] if isinstance(answers, str) else list(answers)
        if len(replies) != len(texts):
            raise DataError(f"MLMambaProcessor: answers must be one per text ({len(texts)}); got {len(replies)}.")
        rows, labels = [], []
        for prompt, reply in zip(texts, replies, strict=True):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            whole = self.render(turns if reply is None else [*turns, {"role": "assistant", "content": reply}])
            ids: list[int] = []
            learned: list[int] = []
            for index, turn in enumerate(whole):
                own = self._tokens(turn)
                ids += own
                learned += own if index % 2 else [IGNORED] * len(own)
            rows.append(ids[:max_text_tokens])
            labels.append(learned[:max_text_tokens])
            if all(label == IGNORED for label in labels[-1]):
                raise DataError(
                    "MLMambaProcessor: a conversation must hold an answer within max_text_tokens = "
                    f"{max_text_tokens}; got {prompt!r}. Raise it or leave the sample out."
                )
        return self._batch(rows, labels, sources, side="right")

    def for_align(self, captions: Any, images: Any = None, *, max_text_tokens: int | None = 2048) -> BatchFeature:
        """Captions behind their images: caption and end token, all of them learned, no prompt.

        Args:
            captions: one text, or a list.
            images: as for a call.
            max_text_tokens: longer captions lose their end.

        Returns:
            As `for_sft`.
        """
        texts, sources = _as_batch(captions, images)
        if not all(isinstance(text, str) for text in texts):
            raise DataError("MLMambaProcessor: captions must be texts; got a conversation. Use for_sft.")
        eos = self.tokenizer.eos_token
        plain = [text.replace(IMAGE_MARK, "").strip() for text in texts]
        rows = [self._tokens(f"{text}{eos}")[:max_text_tokens] for text in plain]
        return self._batch(rows, [list(row) for row in rows], sources, side="right")

    def _tokens(self, text: str) -> list[int]:
        check_words(self.tokenizer, text)
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _batch(self, rows: list[list[int]], labels: list[list[int]] | None, sources: list[Any], side: str) -> Any:
        width = max(map(len, rows))
        fill = self.tokenizer.pad_token_id
        fill = self.tokenizer.eos_token_id if fill is None else fill

        def pad(lists: list[list[int]], value: int) -> Tensor:
            fills = [[value] * (width - len(own)) for own in lists]
            pairs = zip(lists, fills, strict=True)
            return torch.tensor([extra + own if side == "left" else own + extra for own, extra in pairs])

        data = {"input_ids": pad(rows, int(fill)), "attention_mask": pad([[1] * len(row) for row in rows], 0)}
        if labels is not None:
            data["labels"] = pad(labels, IGNORED)
        if any(source is not None for source in sources):
            data["pixel_values"] = torch.stack([self._pixels(source) for source in sources])
            data["has_image"] = torch.tensor([source is not None for source in sources])
        return BatchFeature(data)

    def _pixels(self, source: Any) -> Tensor:
        """(towers, channels, size, size); zeros, never looked at, where there is no image."""
        if source is None:
            return torch.zeros(len(self.image_mean), len(self.image_mean[0]), self.image_size, self.image_size)
        towers = zip(self.image_mean, self.image_std, strict=True)
        return torch.stack([image_to_tower(source, self.image_size, m, s, self.strategy) for m, s in towers])

    @property
    def model_input_names(self) -> list[str]:
        """The keys a call may return."""
        return ["input_ids", "attention_mask", "pixel_values", "has_image"]


def _as_batch(text: Any, images: Any) -> tuple[list[Any], list[Any]]:
    """Texts and, for each, its image or None."""
    if text is None or (isinstance(text, list | tuple) and not text):
        raise DataError("MLMambaProcessor: text must be a question or a conversation; got none. Pass text=.")
    single = isinstance(text, str) or (isinstance(text, list | tuple) and isinstance(text[0], dict))
    texts = [text] if single else list(text)
    if images is None:
        return texts, [None] * len(texts)
    entries = [images] if single and not isinstance(images, list | tuple) else images
    if not isinstance(entries, list | tuple) or len(entries) != len(texts):
        count = len(entries) if isinstance(entries, list | tuple) else 1
        raise DataError(
            f"MLMambaProcessor: images must be one per text ({len(texts)}); got {count}. Use None for a text without "
            "image; several images of one text are not part of this model."
        )
    flat = []
    for entry in entries:
        inner = list(entry) if isinstance(entry, list | tuple) else [entry]
        if len(inner) > 1:
            raise DataError(f"MLMambaProcessor: a text must have one image at most; got {len(inner)}. Split it.")
        flat.append(inner[0] if inner else None)
    return texts, flat
