"""Canvases as PNG files, and the processor that makes of a PNG what a canvas batch holds."""

from typing import Any

import torch

from mmkernels.data import CanvasTask


def canvas_processor(task: CanvasTask, config: Any) -> Any:
    """A processor that turns (question, image file) into what the task's batches hold: no chat turns, one tile."""
    from mmkernels.models.common.word_tokenizer import build_word_tokenizer
    from mmkernels.models.mmmamba import MMMambaProcessor

    return MMMambaProcessor.from_config(
        build_word_tokenizer(list(task.vocab), special_tokens=["<image>"]),
        config,
        chat=False,
        prompt_order=task.order,
        image_start_token=None,
        image_end_token=None,
        max_tiles=1,
        use_thumbnail=False,
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
    )


def save_canvases(task: CanvasTask, folder: Any, count: int = 6) -> list[tuple[str, str, str]]:
    """Write unseen canvases as PNG files; returns (file name, question, answer) of each."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    batch = task.batch(0, count, split="test")
    written = []
    for i in range(count):
        pixels = (batch["images"][i].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)
        name = f"canvas{i}.png"
        Image.fromarray(pixels.squeeze(-1).numpy()).save(folder / name)
        written.append((name, task.decode(batch["question_ids"][i]), task.vocab[int(batch["answer_ids"][i])]))
    return written
