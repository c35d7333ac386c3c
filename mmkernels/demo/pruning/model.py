"""A LLaVA of a quarter of a million parameters: a vision transformer with [CLS], a projector, a decoder.

Stock transformers classes, so that `mmkernels.prune` does to it what it does to LLaVA-1.5.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.demo.pruning.task import CELL, FIRST, GRID, PATCH, PruningTask

_IMAGE = 3 * CELL


def fresh_model(task: PruningTask, seed: int) -> Any:
    """A model with random weights, the same for the same seed."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=_IMAGE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(task.vocab),
        max_position_embeddings=64,
        initializer_range=0.1,  # about 1 / sqrt(width): 0.02 is for widths of thousands
        pad_token_id=task.word_id["<pad>"],
        bos_token_id=None,
        eos_token_id=task.word_id["<eos>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=task.image_id,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    return model


class TrainingHeads(nn.Module):
    """What only training needs: [CLS] names the classes of the canvas, every patch names its own."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.canvas, self.patch = nn.Linear(width, classes), nn.Linear(width, classes + 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 1 + patches, width) -> logits of the canvas (batch, classes), of patches (batch, patches, ...)."""
        hidden = self.norm(hidden)
        return self.canvas(hidden[:, 0]), self.patch(hidden[:, 1:])


def encode_and_read(model: Any, images: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the encoder and logits of the decoder: the model's own forward, with both to be seen."""
    core = model.model
    hidden = core.vision_tower(images).last_hidden_state
    tokens = core.multi_modal_projector(hidden[:, 1:])
    words = core.get_input_embeddings()(input_ids)
    embeddings = torch.cat([words[:, :FIRST], tokens, words[:, FIRST + tokens.shape[1] :]], 1)
    read = core.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return hidden, model.lm_head(read)


def save(model: Any, task: PruningTask, folder: Path) -> None:
    """The model with an image processor, for `mmkernels prune --model`."""
    from transformers import CLIPImageProcessor

    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"height": _IMAGE, "width": _IMAGE}, do_center_crop=False, do_normalize=False
    ).save_pretrained(folder)
