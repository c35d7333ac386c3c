"""Draw which patches of an image a pruner keeps: those lit, the others in the dark."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkernels.errors import CheckpointError, ConfigError, DataError, ShapeError
from mmkernels.interop.prune import prune
from mmkernels.interop.prune_seams import Choice, Llava, seam_of
from mmkernels.interop.prune_tower import Tower, vit
from mmkernels.pruning.pruner import TokenPruner, VisionInputs

_DARK = 0.28  # brightness of what is dropped
_FRAME = (0.10, 0.85, 0.55)
_LEAST = 336  # pixels along the picture's shorter side


def light(image: Tensor, indices: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """The image with kept patches lit and framed, the others dark.

    Args:
        image: (3, H, W) in [0, 1], H and W multiples of the grid.
        indices: patches that are kept, in raster order.
        grid: (height, width) of the patches.

    Returns:
        (3, H s, W s), s the smallest whole number that makes the shorter side 336 or more.
    """
    height, width = grid
    if image.dim() != 3 or image.shape[1] % height or image.shape[2] % width:
        raise ShapeError(
            f"light: image must have shape (3, H, W) in whole patches of a {height} x {width} grid; "
            f"got {tuple(image.shape)}. Give the image as the tower sees it."
        )
    scale = math.ceil(_LEAST / min(image.shape[1:]))
    big = F.interpolate(image[None], scale_factor=scale, mode="nearest")[0]
    lit = torch.zeros(height * width)
    lit[torch.as_tensor(indices, dtype=torch.int64)] = 1
    tall, wide = big.shape[1] // height, big.shape[2] // width
    shade = lit.view(height, width).repeat_interleave(tall, 0).repeat_interleave(wide, 1)
    line = max(1, min(tall, wide) // 16)
    rows, columns = torch.arange(big.shape[1]) % tall, torch.arange(big.shape[2]) % wide
    edge = ((rows < line) | (rows >= tall - line))[:, None] | ((columns < line) | (columns >= wide - line))
    out = big * (_DARK + (1 - _DARK) * shade)
    frame = edge & (shade > 0)
    return torch.where(frame, torch.tensor(_FRAME)[:, None, None], out)


def show(
    folder: Path,
    image: Path,
    out: Path,
    pruner: TokenPruner,
    *,
    feature_layer: int = -2,
) -> tuple[int, int]:
    """Draw the patches of an image file that a pruner keeps.

    Args:
        folder: a saved LLaVA, or a saved vision tower (CLIP, SigLIP, ViT, DINOv2), with its image processor.
        image: any image file.
        out: picture to write.
        pruner: of the vision side.
        feature_layer: of a bare tower, the layer whose output would be handed on, as `vision_feature_layer` counts;
            a LLaVA's configuration says it.

    Returns:
        (tokens that stay, patches of the image).

    Raises:
        CheckpointError: no model or no image processor in the folder.
        DataError: the file is no image.
        BackendError, ConfigError: a model or a pruner that cannot be shown.
    """
    if pruner.stage == "decoder_layer":
        raise ConfigError(
            f"prune: method must be of the vision side; got {pruner.name!r}, which drops tokens between layers of the "
            "language model, by the question. Use vtc_cls, or mmkernels.prune with a prompt."
        )
    model, processor, reads = _load(folder)
    pixels = _pixels(processor, image)
    with torch.no_grad():
        if reads:
            pruned, grid = _of_llava(seam_of(model), pixels, pruner)
        else:
            pruned, grid = _of_tower(vit(model), model.config, pixels, pruner, feature_layer)
    picture = light(_unnormalised(pixels, processor)[0], [i for i in pruned.tolist() if i >= 0], grid)
    _write(picture, out)
    return len(pruned), grid[0] * grid[1]


def _of_llava(seam: Llava, pixels: Tensor, pruner: TokenPruner) -> tuple[Tensor, tuple[int, int]]:
    if pixels.dim() != 4:
        raise ConfigError(
            f"prune: model must take one tile an image; got pixels of shape {tuple(pixels.shape)}. Tiled models "
            "(LLaVA-NeXT) keep patches of every tile: use mmkernels.prune and handle.kept."
        )
    with prune(seam.model, pruner):  # checks everything that can be checked before an image comes
        images = seam.take({"pixel_values": pixels}, Choice(pruner))
    assert images is not None
    return images[0].patches, seam.grid()


def _of_tower(
    tower: Tower, config: Any, pixels: Tensor, pruner: TokenPruner, feature_layer: int
) -> tuple[Tensor, tuple[int, int]]:
    """What the pruner keeps of a bare tower's patches; one that works behind the projector gets its input instead."""
    from mmkernels.interop.prune_merging import check_blocks, run_merging
    from mmkernels.pruning.tome import ToMe

    count = len(tower.layers)
    layer = (feature_layer if feature_layer >= 0 else count + 1 + feature_layer) - 1
    if not 0 <= layer < count:
        raise ConfigError(
            f"prune: feature-layer must name an output of the {count} layers, 1 .. {count} or -{count} .. -1; "
            f"got {feature_layer}. LLaVA-1.5 takes -2."
        )
    grid = (pixels.shape[-2] // config.patch_size, pixels.shape[-1] // config.patch_size)
    encoder, first = tower.encoder(layer, grid), tower.num_prefix
    if isinstance(pruner, ToMe):
        check_blocks(tower)
        return run_merging(tower, pixels, pruner, encoder)[1].indices[0], grid
    seen = tower.run(pixels, num_tokens=grid[0] * grid[1], layers=(layer,), taps=pruner.taps(encoder))
    hidden = seen.hidden[layer]
    pruned = pruner(VisionInputs(hidden[:, first:], grid, hidden[:, :first], seen.taps))
    return pruned.indices[0][pruned.mask[0]], grid


def _load(folder: Path) -> tuple[Any, Any, bool]:
    """A model, its image processor, and whether it is a vision-language model or a vision tower alone."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
    )

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"prune: model must be a folder written by save_pretrained; {folder} has no config.json. Run `mmkernels "
            "demo --task pruning` first and use out/pruning/model, or save a vision tower there."
        )
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        raise CheckpointError(
            f"prune: model must have its image processor beside it; {folder} has no preprocessor_config.json. "
            "Save it there: image_processor.save_pretrained(folder)."
        )
    try:
        reads = type(AutoConfig.from_pretrained(folder, local_files_only=True)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        kind: Any = AutoModelForImageTextToText if reads else AutoModel
        model, notes = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"prune: model must be loadable; {folder}: {error}. Save it again.") from error
    if notes["missing_keys"]:
        raise CheckpointError(
            f"prune: model must have all its weights; {folder} lacks {sorted(notes['missing_keys'])[:3]}. "
            "Save it again."
        )
    return (model if reads else getattr(model, "vision_model", model)).eval(), processor, reads


def _pixels(processor: Any, image: Path) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"prune: image must be a readable image file; got {image}: {error}.") from error
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"]
    return pixels


def _unnormalised(pixels: Tensor, processor: Any) -> Tensor:
    if not getattr(processor, "do_normalize", False):
        return pixels.clamp(0, 1)
    mean, std = (torch.tensor(getattr(processor, f"image_{name}"))[:, None, None] for name in ("mean", "std"))
    return (pixels * std + mean).clamp(0, 1)


def _write(picture: Tensor, out: Path) -> None:
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    try:
        Image.fromarray(pixels).save(out)
    except (OSError, ValueError) as error:
        raise DataError(f"prune: show must be a picture that can be written; got {out}: {error}.") from error
