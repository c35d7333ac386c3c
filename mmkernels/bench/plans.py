"""Which cells are raced: a quick look, a usual run, everything, or what was asked for."""

import dataclasses
from collections.abc import Sequence

from mmkernels.bench.ops import OPS
from mmkernels.bench.shapes import DTYPES, LAYERS, LENGTHS, Cell, shape_named
from mmkernels.errors import ConfigError, nearest

DECODE = ("ssd_update", "causal_conv1d_update")
PRUNING = ("prune_tokens", "cls_attention_scores", "attention_column_scores", "merge_tokens")
GRIDS = ("scan2d_bidirectional", "scan2d_cross")
EXTRAS = ("memory", "first_call")
PARTS = (*OPS, *EXTRAS)
PASSES = ("forward", "backward")  # of a race; the latter times both together
# Left out of a quick look: compiling takes longer than everything else, and one call takes seconds.
_SLOW = frozenset({"flex_attention", "torch.compile, chunk 64", "torch.compile, chunk 128", "selective_scan_ref"})
_HEAVY = frozenset({"selective_scan_ref"})  # its memory grows with heads x tokens x dstate: gigabytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        cells: of the races.
        memory: cells whose contestants' peak memory is taken, each in a fresh process.
        first_calls: cells whose first call in a fresh process is timed.
        without: contestants left out.
        rounds: clean samples of each contestant.
        budget: seconds for one race.
        patience: seconds for each contestant of a race, at least.
        shortest: seconds of one sample.
    """

    cells: tuple[Cell, ...]
    memory: tuple[Cell, ...] = ()
    first_calls: tuple[Cell, ...] = ()
    without: frozenset[str] = frozenset()
    rounds: int = 5
    budget: float = 8.0
    patience: float = 0.0
    shortest: float = 0.1


def thread_counts(all_threads: int) -> tuple[int, ...]:
    """One and all of them."""
    return (1, all_threads) if all_threads > 1 else (1,)


def _cells(op: str, shapes: Sequence[str], lengths: Sequence[int], dtypes: Sequence[str], threads: Sequence[int],
           backward: bool = False) -> list[Cell]:  # fmt: skip
    lengths = (1,) if op in DECODE else lengths
    return [
        Cell(op, shape, length, dtype, count, backward)
        for shape in shapes
        if shape in OPS[op].shapes
        for length in lengths
        for dtype in dtypes
        for count in threads
    ]


def _first_calls(threads: int, ops: Sequence[str]) -> tuple[Cell, ...]:
    return tuple(
        Cell(op, "130m", 1 if op in DECODE else 512, "float32", threads)
        for op in ops
        if "130m" in OPS[op].shapes and op not in ("mixer", *GRIDS)  # several ops each
    )


def quick(threads: int) -> Plan:
    """Every op once at the smallest layer, less than 90 seconds."""
    ops = tuple(op for op in OPS if op != "scan2d_cross")
    cells = [cell for op in ops for cell in _cells(op, ("130m",), (512,), ("float32",), (threads,))]
    cells += _cells("mma_attention", ("aki",), (512,), ("float32",), (threads,))
    cells += _cells("mma_attention_decode", ("kv-cache",), (8192,), ("bfloat16",), (threads,))
    cells += _cells("prune_tokens", ("clip-l-x16",), (576,), ("float32",), (threads,))
    cells += [cell for op in PRUNING[1:] for cell in _cells(op, ("clip-l",), (576,), ("float32",), (threads,))]
    return Plan(tuple(cells), (), _first_calls(threads, ("ssd_scan",)), _SLOW, rounds=3, budget=4.0, shortest=0.05)


def usual(threads: int) -> Plan:
    """Every op at two lengths of the smallest layer, both dtypes; a few minutes."""
    cells = [cell for op in OPS for cell in _cells(op, ("130m",), (512, 2048), DTYPES, (threads,))]
    cells += _cells("ssd_scan", ("130m",), (512,), ("float32",), (threads,), backward=True)
    cells += _cells("mma_attention", ("aki",), (1024,), DTYPES, (threads,))
    cells += _cells("mma_attention", ("aki",), (1024,), ("float32",), (threads,), backward=True)
    cells += _cells("mma_attention_decode", ("kv-cache",), (8192, 32768), ("bfloat16",), (threads,))
    cells += [cell for op in PRUNING for cell in _cells(op, OPS[op].shapes, (576,), DTYPES, (threads,))]
    memory = (Cell("ssd_scan", "130m", 2048, "float32", threads),)
    return Plan(tuple(cells), memory, _first_calls(threads, tuple(OPS)), _SLOW)


def full(threads: int) -> Plan:
    """The tables of benchmarks/results: every shape and length where it says something new; most of an hour."""
    every, both = LAYERS, thread_counts(threads)
    one = both[:-1]  # nothing on a machine with one processor
    scan = [
        *_cells("ssd_scan", every, LENGTHS, ("float32",), (threads,)),
        *_cells("ssd_scan", ("130m",), LENGTHS, ("bfloat16",), (threads,)),
        *_cells("ssd_scan", every[1:], (2048,), ("bfloat16",), (threads,)),
        *_cells("ssd_scan", ("130m",), LENGTHS, ("float32",), one),
        *_cells("ssd_scan", every[1:], (2048,), ("float32",), one),
        *_cells("ssd_scan", ("130m",), (2048,), ("bfloat16",), one),
        *_cells("ssd_scan", every, (512,), ("float32",), (threads,), backward=True),
        *_cells("ssd_scan", ("130m",), (2048,), DTYPES, (threads,), backward=True),
        *_cells("ssd_scan", ("130m",), (512,), ("float32",), one, backward=True),
        *_cells("ssd_scan", ("training",), (20,), ("float32",), (threads,), backward=True),
    ]
    streams = [
        cell
        for op in ("causal_conv1d", "gated_rms_norm")
        for cell in (
            *_cells(op, every, (2048,), DTYPES, (threads,)),
            *_cells(op, ("130m",), (512, 8192), ("float32",), (threads,)),
            *_cells(op, ("130m", "2.7b"), (2048,), DTYPES, one),
            *_cells(op, ("130m", "2.7b"), (2048,), ("float32",), (threads,), backward=True),
            *_cells(op, ("training",), (20,), ("float32",), (threads,), backward=True),
        )
    ]
    decode = [cell for op in DECODE for cell in _cells(op, every, (1,), DTYPES, both)]
    mixer = [
        *_cells("mixer", ("130m",), LENGTHS, ("float32",), (threads,)),
        *_cells("mixer", ("1.3b", "2.7b"), (2048,), ("float32",), (threads,)),
        *_cells("mixer", OPS["mixer"].shapes, (2048,), ("bfloat16",), (threads,)),
        *_cells("mixer", ("130m",), (2048,), ("float32",), one),
    ]
    grids = [
        *_cells("scan2d_bidirectional", ("130m", "2.7b"), (729, 2916), ("float32",), both),
        *_cells("scan2d_bidirectional", ("2.7b",), (729,), ("bfloat16",), (threads,)),
        *_cells("scan2d_bidirectional", ("2.7b",), (729,), ("float32",), (threads,), backward=True),
        *_cells("scan2d_cross", ("2.7b",), (729, 2916), ("float32",), (threads,)),
        *_cells("scan2d_cross", ("2.7b",), (729,), ("float32",), (threads,), backward=True),
    ]
    attention = [
        *_cells("mma_attention", ("aki", "aki-d128", "bidir"), (1024,), DTYPES, both),
        *_cells("mma_attention", ("aki-d128", "aki-short-d128", "bidir-d128"), (4096,), ("float32",), (threads,)),
        *_cells("mma_attention", ("aki", "aki-d128"), (1024,), ("float32",), both, backward=True),
        *_cells("mma_attention", ("aki-d128", "aki-short-d128"), (4096,), ("float32",), (threads,), backward=True),
        *_cells("mma_attention_decode", ("kv-cache",), (8192, 32768, 105472), ("bfloat16",), both),
    ]
    pruned = [cell for op in PRUNING for cell in _cells(op, OPS[op].shapes, (576,), DTYPES, both)]
    memory = (
        *_cells("attention_column_scores", ("clip-l",), (576,), ("float32",), (threads,)),
        *_cells("mma_attention", ("aki-d128",), (4096,), ("float32",), (threads,)),
        *_cells("mma_attention", ("aki-d128",), (4096,), ("float32",), (threads,), backward=True),
        *_cells("ssd_scan", ("130m", "2.7b"), (2048,), ("float32",), (threads,)),
        *_cells("ssd_scan", ("130m",), (512,), ("float32",), (threads,), backward=True),
        *_cells("causal_conv1d", ("2.7b",), (2048,), ("float32",), (threads,)),
    )
    cells = tuple(scan + streams + decode + mixer + grids + attention + pruned)
    return Plan(cells, memory, _first_calls(threads, tuple(OPS)), patience=4.0)


def asked(
    base: Plan,
    *,
    parts: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    passes: Sequence[str] | None = None,
) -> Plan:
    """A plan narrowed to some parts, and its races replaced by every combination of the sizes that are given.

    Raises:
        ConfigError: a name nobody knows, or nothing is left.
    """
    for part in parts or ():
        if part not in PARTS:
            raise ConfigError(f"bench: --ops must name parts of the benchmark; got {part!r}. {nearest(part, PARTS)}")
    for shape in shapes or ():
        shape_named(shape)
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ConfigError(
                f"bench: --dtypes must be among {', '.join(DTYPES)}; got {dtype!r}. Leave it out for both."
            )
    for name in passes or ():
        if name not in PASSES:
            raise ConfigError(
                f"bench: --passes must be among {', '.join(PASSES)}; got {name!r}. Leave it out for both."
            )
    for name, values in (("--lengths", lengths), ("--threads", threads)):
        if any(value < 1 for value in values or ()):
            raise ConfigError(f"bench: {name} must be positive; got {list(values or ())}. Give numbers like 512,2048.")
    parts = tuple(parts or PARTS)
    cells = [c for c in base.cells if c.op in parts and (not passes or PASSES[c.backward] in passes)]
    if shapes or lengths or dtypes or threads:
        cells = _sized(cells, parts, shapes, lengths, dtypes, threads)
    kept = {"memory": base.memory, "first_call": base.first_calls}
    extras = {name: cells_ if name in parts else () for name, cells_ in kept.items()}
    if not cells and not any(extras.values()):
        raise ConfigError("bench: the choice must leave something to do; got none. Widen --ops, --shapes or --lengths.")
    return dataclasses.replace(base, cells=tuple(cells), memory=extras["memory"], first_calls=extras["first_call"])


def _sized(
    cells: list[Cell],
    parts: Sequence[str],
    shapes: Sequence[str] | None,
    lengths: Sequence[int] | None,
    dtypes: Sequence[str] | None,
    threads: Sequence[int] | None,
) -> list[Cell]:
    """Every combination of the given sizes; what is not given is as the plan has it for that op."""
    found: dict[Cell, None] = {}
    for op in (p for p in parts if p in OPS):
        own = [c for c in cells if c.op == op]
        for backward in sorted({c.backward for c in own}):
            same = [c for c in own if c.backward == backward]
            for cell in _cells(
                op,
                shapes or list(dict.fromkeys(c.shape for c in same)),
                lengths or list(dict.fromkeys(c.seqlen for c in same)),
                dtypes or list(dict.fromkeys(c.dtype for c in same)),
                threads or list(dict.fromkeys(c.threads for c in same)),
                backward,
            ):
                found[cell] = None
    return list(found)


def entrants(
    op: str,
    shapes: Sequence[str],
    lengths: Sequence[int],
    *,
    threads: int,
    dtypes: Sequence[str] = DTYPES,
    backward: bool = False,
    without: frozenset[str] = _SLOW,
) -> list[tuple[Cell, str]]:
    """Cells with each of their contestants that can run in this process: parameters for pytest-benchmark."""
    return [
        (cell, contestant.name)
        for cell in _cells(op, shapes, lengths, dtypes, (threads,), backward)
        for contestant in OPS[op].contestants
        if contestant.name not in without and not contestant.tuned_malloc and contestant.objection(cell) is None
    ]


def taking_part(plan: Plan, cell: Cell, *, memory: bool = False) -> list[str]:
    """Names of the contestants of a cell."""
    left_out = plan.without | (_HEAVY if memory else frozenset())
    return [c.name for c in OPS[cell.op].contestants if c.name not in left_out and not (memory and c.tuned_malloc)]
