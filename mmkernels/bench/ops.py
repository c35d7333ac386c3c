"""The ops that are raced: inputs, truth, useful work, and who takes part."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmkernels.bench import problems, shapes
from mmkernels.bench.peers import (
    attention,
    compiled,
    ggml,
    mamba_ssm_ref,
    ours,
    plain_torch,
    pruning,
    scan2d,
    torchmamba,
    transformers_cpu,
)
from mmkernels.bench.problems import Contestant, Prepared, Problem
from mmkernels.bench.shapes import Cell
from mmkernels.errors import ConfigError, nearest

OURS = "mmkernels"
_NO_GRADIENTS = "has no backward"
_FORWARD_ONLY = "raced forward only"


@dataclasses.dataclass(frozen=True)
class OpRace:
    """One op.

    Attributes:
        build: inputs of a cell.
        truth: the float64 formula of those inputs.
        contestants: in the order of the table; the first is this package.
        baseline: the contestant that ratios are quoted against first: what a user has without this package.
        limits: of the machine, raced along (names of `mmkernels.bench.limits.WORK`).
        flops: useful floating-point operations of a call, where arithmetic is the limit.
        bytes: bytes a call must move, where memory is.
        shapes: the layers it is defined for.
    """

    build: Callable[[Cell], Problem]
    truth: Callable[[dict[str, Any]], Tensor]
    contestants: tuple[Contestant, ...]
    baseline: str
    limits: tuple[str, ...]
    flops: Callable[[Cell], float] | None = None
    bytes: Callable[[Cell], float] | None = None
    shapes: tuple[str, ...] = shapes.RECURRENT

    def contestant(self, name: str) -> Contestant:
        """The contestant of that name."""
        found = {c.name: c for c in self.contestants}
        if name not in found:
            raise ConfigError(f"bench: a contestant must be known; got {name!r}. {nearest(name, found)}")
        return found[name]


def _takes_long(cell: Cell) -> str | None:
    return "left out: one call takes many seconds" if cell.sizes.nheads * cell.seqlen > 24 * 512 else None


def _compiling_pays(cell: Cell) -> str | None:
    # Every cell is compiled anew, for some tens of seconds; the larger layers' longest prompts tell nothing new.
    pays = cell.shape in ("130m", "mmmamba") or cell.seqlen <= 2048
    return None if pays else "left out: compiling takes long; see the other lengths and layers"


def _chunk_128_will_do(cell: Cell) -> str | None:
    both = cell.backward or (cell.shape in ("130m", "mmmamba") and cell.seqlen <= 2048)
    return _compiling_pays(cell) if both else "left out: as fast as chunk 128"


def _transformers(
    prepare: Callable[..., Prepared], chunk: int, tuned: bool = False, backward: str | None = None
) -> Contestant:
    return Contestant(
        f"transformers, chunk {chunk}{', tuned malloc' if tuned else ''}",
        functools.partial(prepare, chunk=chunk),
        tuned_malloc=tuned,
        backward=_FORWARD_ONLY if tuned else backward,
    )


def _both(prepare: Callable[..., Prepared], backward: str | None = None) -> tuple[Contestant, Contestant]:
    """The native backend, and the one that needs no compiled code."""
    return (
        Contestant(OURS, prepare, backward=backward),
        Contestant("mmkernels, torch backend", functools.partial(prepare, backend="torch"), backward=backward),
    )


def _tuned(prepare: Callable[..., Prepared]) -> Contestant:
    """The native backend where malloc keeps large blocks: what fresh memory for every output costs."""
    return Contestant("mmkernels, tuned malloc", prepare, tuned_malloc=True, backward=_FORWARD_ONLY)


SCAN = OpRace(
    problems.scan_problem,
    problems.scan_truth,
    (
        *_both(ours.scan),
        _tuned(ours.scan),
        Contestant("ggml_ssm_scan", ggml.scan, dtypes=("float32",), backward=_NO_GRADIENTS),
        Contestant("torch.compile, chunk 64", functools.partial(compiled.scan, chunk=64), left_out=_chunk_128_will_do),
        Contestant(
            "torch.compile, chunk 128",
            functools.partial(compiled.scan, chunk=128),
            backward=_FORWARD_ONLY,
            left_out=_compiling_pays,
        ),
        Contestant("ssd_chunk_scan_combined_ref", mamba_ssm_ref.combined),
        Contestant("ssd_minimal_discrete", mamba_ssm_ref.minimal),
        Contestant("torchmamba", torchmamba.scan),
        _transformers(transformers_cpu.scan, 64),
        _transformers(transformers_cpu.scan, 64, tuned=True),
        _transformers(transformers_cpu.scan, 256),
        _transformers(transformers_cpu.scan, 256, tuned=True),
        Contestant("selective_scan_ref", mamba_ssm_ref.selective, left_out=_takes_long, backward=_FORWARD_ONLY),
    ),
    baseline="transformers, chunk 256",
    limits=("gemm", "read"),
    flops=shapes.scan_flops,
)
CONV = OpRace(
    problems.conv_problem,
    problems.conv_truth,
    (
        *_both(ours.conv),
        _tuned(ours.conv),
        Contestant("ggml_ssm_conv", ggml.conv, dtypes=("float32",), backward=_NO_GRADIENTS),
        Contestant("transformers", transformers_cpu.conv),
        Contestant("transformers, tuned malloc", transformers_cpu.conv, tuned_malloc=True, backward=_FORWARD_ONLY),
    ),
    baseline="transformers",
    limits=("copy", "read"),
    bytes=shapes.conv_bytes,
)
NORM = OpRace(
    problems.norm_problem,
    problems.norm_truth,
    (
        *_both(ours.norm),
        Contestant("F.rms_norm and silu", plain_torch.norm),
        Contestant("transformers", transformers_cpu.norm),
        Contestant("transformers, tuned malloc", transformers_cpu.norm, tuned_malloc=True, backward=_FORWARD_ONLY),
    ),
    baseline="transformers",
    limits=("copy", "read"),
    bytes=shapes.norm_bytes,
)
UPDATE = OpRace(
    problems.update_problem,
    problems.update_truth,
    (
        *_both(ours.update, _FORWARD_ONLY),
        Contestant("ggml_ssm_scan", ggml.update, dtypes=("float32",), backward=_NO_GRADIENTS),
        Contestant("transformers", transformers_cpu.update, backward=_FORWARD_ONLY),
    ),
    baseline="transformers",
    limits=("copy", "read"),
    bytes=shapes.update_bytes,
)
CONV_UPDATE = OpRace(
    problems.conv_update_problem,
    problems.conv_update_truth,
    (
        *_both(ours.conv_update, _FORWARD_ONLY),
        Contestant("transformers", transformers_cpu.conv_update, backward=_FORWARD_ONLY),
    ),
    baseline="transformers",
    limits=("read",),
    bytes=shapes.conv_update_bytes,
)
MIXER = OpRace(
    problems.mixer_problem,
    problems.mixer_truth,
    (
        Contestant(OURS, ours.mixer, backward=_FORWARD_ONLY),
        _transformers(transformers_cpu.mixer, 64, backward=_FORWARD_ONLY),
        _transformers(transformers_cpu.mixer, 256, backward=_FORWARD_ONLY),
        _transformers(transformers_cpu.mixer, 256, tuned=True),
    ),
    baseline="transformers, chunk 256",
    limits=("gemm", "copy"),
    flops=shapes.scan_flops,
    shapes=("130m", "1.3b", "2.7b"),
)
ATTENTION = OpRace(
    attention.attention_problem,
    attention.attention_truth,
    (
        *_both(attention.ours),
        Contestant("SDPA, dense mask", attention.sdpa_dense),
        Contestant("SDPA, dense mask, tuned malloc", attention.sdpa_dense, tuned_malloc=True, backward=_FORWARD_ONLY),
        Contestant("two flash calls merged", attention.two_calls, backward=_FORWARD_ONLY),
        Contestant("flex_attention", attention.flex, backward=_NO_GRADIENTS),
        Contestant("eager softmax", attention.eager),
    ),
    baseline="SDPA, dense mask",
    limits=("gemm",),
    flops=attention.attention_flops,
    shapes=("aki", "aki-d128", "aki-short-d128", "bidir", "bidir-d128"),
)
ATTENTION_DECODE = OpRace(
    attention.attention_problem,
    attention.attention_truth,
    (
        *_both(attention.ours, _FORWARD_ONLY),
        Contestant("SDPA", functools.partial(attention.sdpa_decode, packed=False), backward=_FORWARD_ONLY),
        Contestant("SDPA, packed heads", functools.partial(attention.sdpa_decode, packed=True), backward=_FORWARD_ONLY),
    ),
    baseline="SDPA",
    limits=("read",),
    bytes=attention.cache_bytes,
    shapes=("kv-cache",),
)
PRUNE = OpRace(
    pruning.prune_problem,
    pruning.prune_truth,
    (
        *_both(pruning.ours, _FORWARD_ONLY),
        Contestant("topk, sort, gather", pruning.topk_gather, backward=_FORWARD_ONLY),
        Contestant("topk, sort, index_select", pruning.topk_index_select, backward=_FORWARD_ONLY),
    ),
    baseline="topk, sort, gather",
    limits=("copy",),
    bytes=pruning.prune_bytes,
    shapes=("clip-l", "clip-l-x16"),
)
CLS_SCORES = OpRace(
    pruning.scores_problem,
    pruning.row_truth,
    (
        *_both(pruning.ours_row, _FORWARD_ONLY),
        Contestant("eager map, then its row", pruning.map_row, backward=_FORWARD_ONLY),
        Contestant("softmax of one row", pruning.torch_row, backward=_FORWARD_ONLY),
    ),
    baseline="eager map, then its row",
    limits=("read",),
    bytes=pruning.row_bytes,
    shapes=("clip-l",),
)
COLUMN_SCORES = OpRace(
    pruning.scores_problem,
    pruning.column_truth,
    (
        *_both(pruning.ours_column, _FORWARD_ONLY),
        Contestant("eager map, then its columns", pruning.map_column, backward=_FORWARD_ONLY),
    ),
    baseline="eager map, then its columns",
    limits=("gemm",),
    flops=pruning.column_flops,
    shapes=("clip-l",),
)
MERGE = OpRace(
    pruning.merge_problem,
    pruning.merge_truth,
    (
        *_both(pruning.ours_merge, _FORWARD_ONLY),
        # Of bfloat16 keys the usual way rounds its cosines to bfloat16, and chooses others.
        Contestant(
            "product, argsort, scatter_reduce", pruning.torch_merge, dtypes=("float32",), backward=_FORWARD_ONLY
        ),
    ),
    baseline="product, argsort, scatter_reduce",
    limits=("copy",),
    bytes=pruning.merge_bytes,
    shapes=("clip-l", "clip-l-x16"),
)


def _grid(kind: str) -> OpRace:
    """A grid read in several directions."""
    scans = scan2d.SCANS[kind]
    return OpRace(
        functools.partial(scan2d.grid_problem, scans=scans),
        scan2d.grid_truth,
        (
            *_both(scan2d.ours),
            Contestant("mmkernels, a copy for each direction", scan2d.copies),
            _transformers(scan2d.on_transformers, 64, backward=_FORWARD_ONLY),
        ),
        baseline="transformers, chunk 64",
        limits=("gemm", "copy"),
        flops=functools.partial(scan2d.grid_flops, scans=scans),
        shapes=("130m", "2.7b"),
    )


SCAN2D_BOTH, SCAN2D_CROSS = _grid("bidirectional"), _grid("cross")

OPS = {
    "ssd_scan": SCAN,
    "causal_conv1d": CONV,
    "gated_rms_norm": NORM,
    "ssd_update": UPDATE,
    "causal_conv1d_update": CONV_UPDATE,
    "mixer": MIXER,
    "scan2d_bidirectional": SCAN2D_BOTH,
    "scan2d_cross": SCAN2D_CROSS,
    "mma_attention": ATTENTION,
    "mma_attention_decode": ATTENTION_DECODE,
    "prune_tokens": PRUNE,
    "cls_attention_scores": CLS_SCORES,
    "attention_column_scores": COLUMN_SCORES,
    "merge_tokens": MERGE,
}


def prepare(cell: Cell, contestant: Contestant, *, checked: bool = True) -> tuple[Prepared, float | None]:
    """A contestant at the start line of a cell, and its error on the cell's tiny relative.

    Raises:
        Unavailable: it cannot run here or this, or it is wrong.
    """
    race = OPS[cell.op]
    objection = contestant.objection(cell)
    if objection:
        raise problems.Unavailable(objection)
    error = problems.require_right(cell, contestant.prepare, race.build, race.truth) if checked else None
    problem = race.build(cell)
    prepared = contestant.prepare(problem)
    return (problems.backward_run(problem, prepared) if cell.backward else prepared), error
