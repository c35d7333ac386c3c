"""A decoder over patch, question and answer tokens; who attends whom is an argument of every call.

Pre-norm transformer (arXiv 1706.03762) with RMS norms.  Positions are learned and belong to the token, not to its place
in the sequence: row and column for a patch, number of the word for text.  So the order of a sequence acts through the
mask alone, and arms that differ in order or mask have the same parameters.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.data import CanvasTask
from mmkernels.ops.mma_attention.api import mma_attention
from mmkernels.ops.mma_attention.mask import MMAMask

_POSITION_SCALE = 0.3  # of the initial position vectors, against 1 for words: seen, but not louder than the content


class Block(nn.Module):
    """Attention and a GELU MLP, each behind a norm and a residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor, mask: MMAMask) -> Tensor:
        """(batch, seqlen, width) -> the same."""
        q, k, v = rearrange(self.qkv(self.attention_norm(x)), "b l (n h d) -> n b l h d", n=3, h=self.heads).unbind(0)
        attended = mma_attention(q, k, v, mask)
        assert isinstance(attended, Tensor)  # one result was asked for
        x = x + self.out(attended.flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class CanvasDecoder(nn.Module):
    """A vision-language decoder of half a million parameters for the canvases of a task.

    Args:
        task: tells vocabulary, cells, pixels and the length of a question.
        width, depth, heads: of the decoder.
    """

    def __init__(self, task: CanvasTask, *, width: int = 128, depth: int = 3, heads: int = 4):
        super().__init__()
        self.cell, self.image_id = task.cell, task.image_id
        self.patch = nn.Linear(task.channels * task.cell**2, width)
        self.word = nn.Embedding(len(task.vocab), width)
        self.row, self.column, self.number = (
            nn.Parameter(_POSITION_SCALE * torch.randn(n, width)) for n in (task.grid, task.grid, task.question_len + 1)
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, len(task.vocab), bias=False)

    def forward(self, input_ids: Tensor, images: Tensor, mask: MMAMask) -> Tensor:
        """Logits (batch, seqlen, vocab); position t holds what the model says after token t.

        Args:
            input_ids: (batch, seqlen); image_id where a patch goes, row by row, in any place of the sequence.
            images: (batch, channels, H, W) in [0, 1].
            mask: of this batch and seqlen.
        """
        is_image = input_ids == self.image_id
        number = (torch.cumsum(~is_image, 1) - 1).clamp(min=0)
        x = self.word(input_ids) + self.number[number]
        pixels = rearrange(images, "b c (r y) (s x) -> b (r s) (c y x)", y=self.cell, x=self.cell)
        patches = self.patch(pixels) + rearrange(self.row[:, None] + self.column, "r s d -> (r s) d")
        x = x.masked_scatter(is_image[..., None], patches)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))
