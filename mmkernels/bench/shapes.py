"""The layers that are raced, and how much arithmetic and memory traffic each op of theirs is worth."""

import dataclasses

from mmkernels.errors import ConfigError, nearest

LENGTHS = (512, 2048, 8192)
DTYPES = ("float32", "bfloat16")
_BYTES = {"float32": 4, "bfloat16": 2}
_TILE = 64  # tokens of a chunk in the count of useful arithmetic, whatever chunk a contestant uses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer of a model: the sizes its ops see."""

    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    layers: int
    conv_dim: int
    conv_width: int
    batch: int = 1
    # Attention: "aki", "bidirectional", "cache", "image" (ngroups are key-value heads), and shares of the sequence.
    mask: str = ""
    image: float = 0.0
    question: float = 0.0
    norm_per_head: bool = False  # mmMamba norms every head and gates afterwards; Mamba-2 gates, then norms all channels

    @property
    def d_inner(self) -> int:
        """Channels of all heads."""
        return self.nheads * self.headdim


SHAPES = {
    "130m": Shape(24, 64, 128, 1, layers=24, conv_dim=1792, conv_width=4),
    "1.3b": Shape(64, 64, 128, 1, layers=48, conv_dim=4352, conv_width=4),
    "2.7b": Shape(80, 64, 128, 1, layers=64, conv_dim=5376, conv_width=4),
    "mmmamba": Shape(16, 128, 128, 16, layers=32, conv_dim=4096, conv_width=2, norm_per_head=True),
    "training": Shape(4, 32, 32, 1, layers=4, conv_dim=256, conv_width=2, batch=64, norm_per_head=True),
}


def _attention(nheads: int, headdim: int, ngroups: int, mask: str, image: float = 0.0, question: float = 0.0) -> Shape:
    return Shape(nheads, headdim, 0, ngroups, 1, conv_dim=0, conv_width=0, mask=mask, image=image, question=question)


# Phi-3.5's 32 heads of 96 and Llama's of 128; 576 image tokens of 1024, the rest the question; 2880 of 4096 with 64.
SHAPES |= {
    "aki": _attention(32, 96, 32, "aki", 576 / 1024, 448 / 1024),
    "aki-d128": _attention(32, 128, 32, "aki", 576 / 1024, 448 / 1024),
    "aki-short-d128": _attention(32, 128, 32, "aki", 2880 / 4096, 64 / 4096),
    "bidir": _attention(32, 96, 32, "bidirectional", 576 / 1024),
    "bidir-d128": _attention(32, 128, 32, "bidirectional", 2880 / 4096),
    "kv-cache": _attention(16, 128, 8, "cache"),
    "clip-l": _attention(16, 64, 16, "image"),
}
SHAPES["clip-l-x16"] = dataclasses.replace(SHAPES["clip-l"], batch=16)  # images in a batch, or crops of three
RECURRENT = tuple(name for name, shape in SHAPES.items() if not shape.mask)
LAYERS = ("130m", "1.3b", "2.7b", "mmmamba")  # of models; "training" is a batch of short rows of a small one


@dataclasses.dataclass(frozen=True)
class Cell:
    """One race: an op at one shape, length, dtype, direction and number of threads.

    Attributes:
        op: name of an entry of `mmkernels.bench.races.OPS`.
        shape: name of an entry of SHAPES.
        seqlen: tokens; 1 for the decode ops.
        dtype: of the activations, "float32" or "bfloat16".
        threads: of every contestant.
        backward: forward and backward instead of forward.
        tiny: the small relative on which contestants are checked: two groups or heads, two layers.
    """

    op: str
    shape: str
    seqlen: int
    dtype: str = "float32"
    threads: int = 1
    backward: bool = False
    tiny: bool = False

    @property
    def sizes(self) -> Shape:
        """Sizes of the layer; of the tiny relative if this is one."""
        full = SHAPES[self.shape]
        if not self.tiny:
            return full
        if full.mask:
            return dataclasses.replace(full, nheads=4, ngroups=4 if full.nheads == full.ngroups else 2)
        groups = min(2, full.ngroups)
        heads, width = 2, 2 * full.headdim
        return dataclasses.replace(
            full,
            nheads=heads,
            ngroups=groups,
            layers=2,
            batch=min(2, full.batch),
            conv_dim=width + 2 * groups * full.dstate,
        )

    @property
    def id(self) -> str:
        """Its name in results.json, e.g. scan/130m/2048/float32/2T/forward."""
        direction = "forward+backward" if self.backward else "forward"
        return f"{self.op}/{self.shape}/{self.seqlen}/{self.dtype}/{self.threads}T/{direction}"

    def __str__(self) -> str:
        return self.id


def shape_named(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"bench: --shapes must name layers; got {name!r}. {nearest(name, SHAPES)}")
    return SHAPES[name]


def scan_flops(cell: Cell) -> float:
    """Useful floating-point operations of a forward scan.

    L H (4 P N + 64 P) + 64 G L N: two products of the state with every token, the causal half of one 64 x 64 tile per
    head and of its C B^T per group.  The same count for every contestant.
    """
    s, length = cell.sizes, cell.sizes.batch * cell.seqlen
    per_head = 4 * s.headdim * s.dstate + _TILE * s.headdim
    return float(length * s.nheads * per_head + s.ngroups * length * _TILE * s.dstate)


def conv_bytes(cell: Cell) -> float:
    """Bytes a convolution must move: its input once, its output once."""
    return 2.0 * cell.sizes.batch * cell.seqlen * cell.sizes.conv_dim * _BYTES[cell.dtype]


def norm_bytes(cell: Cell) -> float:
    """Bytes a gated norm must move: x and z once, its output once."""
    return 3.0 * cell.sizes.batch * cell.seqlen * cell.sizes.d_inner * _BYTES[cell.dtype]


def update_bytes(cell: Cell) -> float:
    """Bytes one decode step of a layer must move: its float32 state, read and written."""
    s = cell.sizes
    return 2.0 * s.batch * s.nheads * s.headdim * s.dstate * 4


def conv_update_bytes(cell: Cell) -> float:
    """Bytes one decode step of the convolution must move: its state both ways, its weights once."""
    s = cell.sizes
    return (2.0 * s.batch * (s.conv_width - 1) + s.conv_width + 1 + 2 * s.batch) * s.conv_dim * _BYTES[cell.dtype]
