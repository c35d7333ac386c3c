"""Ask a saved model about an image file."""

from pathlib import Path
from typing import Any

from mmkernels.errors import CheckpointError, DataError


def load(model_folder: Path) -> tuple[Any, Any]:
    """Model (eval mode) and processor of a folder written by save_pretrained.

    Raises:
        CheckpointError: the folder is not there or holds no such model; the weights are damaged, incomplete, of
            another model, or not finite.
    """
    from mmkernels.models.common.checkpoint_files import read_json

    if not (model_folder / "config.json").is_file():
        raise CheckpointError(
            f"generate: model must be a folder written by save_pretrained; {model_folder} has no config.json. "
            "Run `mmkernels demo` first, then use out/linear, out/hybrid or out/teacher."
        )
    if read_json(model_folder / "config.json").get("model_type") == "ml_mamba":
        return _load_ml_mamba(model_folder)
    from mmkernels.models.mmmamba import MMMambaForConditionalGeneration, MMMambaProcessor
    from mmkernels.models.mmmamba.convert_mmmamba import load_checkpoint

    # from_pretrained alone would draw missing weights at random, with a warning, and take NaN for an answer
    load_checkpoint(model_folder, layout="mmkernels")
    model = MMMambaForConditionalGeneration.from_pretrained(model_folder)
    return model.eval(), MMMambaProcessor.from_pretrained(model_folder)


def _load_ml_mamba(model_folder: Path) -> tuple[Any, Any]:
    from mmkernels.models.ml_mamba import MLMambaForConditionalGeneration, MLMambaProcessor, load_checkpoint

    load_checkpoint(model_folder, layout="mmkernels")
    model = MLMambaForConditionalGeneration.from_pretrained(model_folder)
    return model.eval(), MLMambaProcessor.from_pretrained(model_folder)


def answer(model_folder: Path, image: Path, question: str, *, max_new_tokens: int | None = None) -> str:
    """The model's words about the image.

    Args:
        model_folder: written by save_pretrained, processor included.
        image: any image file; it is resized to the model's tile.
        question: in words the model knows, e.g. "what is in the topleft ?".
        max_new_tokens: where to stop if the model does not; None = as its generation_config says.

    Raises:
        CheckpointError: no model in the folder.
        DataError: the file is no image, or a word is unknown.
    """
    if not question.strip():
        raise DataError('generate: question must hold words; got an empty one. Try "what is in the topleft ?".')
    model, processor = load(model_folder)
    inputs = processor(question.lower(), images=image)
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    out = model.generate(**inputs, **limit, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True)).strip()
