"""Backend "triton" of mma_attention: plan, allocation and launches; the kernels are in _triton_kernels*.py."""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._gradients import wants_gradient
from mmkernels.ops.mma_attention import _autograd

_triton.require()
from mmkernels import _triton_math  # noqa: E402  (needs triton, which is known to be there only now)
from mmkernels.ops.mma_attention import _triton_kernels as kernels  # noqa: E402
from mmkernels.ops.mma_attention import _triton_kernels_backward as backward_kernels  # noqa: E402
from mmkernels.ops.mma_attention import _triton_kernels_plan as plan_kernels  # noqa: E402

_PROGRAMS = 256  # below that many, keys are split: two programs for every processor of the largest GPUs
_SPLIT_TILES = 2  # a split of fewer tiles of keys costs more in merging than it gains


def mma_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    rects: Tensor,
    scale: float,
    mass_weights: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See mmkernels.mma_attention."""
    op = _fwd if wants_gradient(q, k, v) else _inference
    weights = None if mass_weights is None else mass_weights.detach()
    out, lse, mass = op(q, k, v, row_start, row_end, rects, weights, scale)
    return out, lse if return_lse else None, mass if mass_weights is not None else None


class _Call:
    """What the kernels of one call are told about its tensors."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, row_start: Tensor, row_end: Tensor, rects: Tensor, scale: float
    ):
        self.batch, self.qlen, self.nheads, self.headdim = q.shape
        self.klen, self.nkvheads = k.shape[1:3]
        self.group = self.nheads // self.nkvheads if self.nkvheads else 1
        self.q, self.k, self.v = (_dense_channels(t) for t in (q, k, v))
        self.acc = _triton.accumulator(q.dtype)
        self.shape = (_triton.architecture(q.device), self.headdim, q.element_size())
        self.scale = scale
        self.unit = _unit(self.q, self.k, self.v)
        self.mask = (row_start.contiguous(), row_end.contiguous(), *_sorted(rects, self.batch))

    def classify(self, config: _triton.Config, group: int) -> Tensor:
        """Classes of all tiles, (batch, query tiles, key tiles) int8."""
        rows, keys = config.blocks["ROWS"], config.blocks["KEYS"]
        shape = (self.batch, -(-self.qlen * group // rows), -(-self.klen // keys))
        classes = self.q.new_empty(shape, dtype=torch.int8)
        chosen = plan_kernels.classify_config(rows, keys, group)
        grid = (shape[0] * shape[1],)
        _triton.launch(
            plan_kernels.classify_kernel,
            grid,
            chosen,
            *self.mask,
            classes,
            self.qlen,
            self.klen,
            *shape[1:],
            GROUP=group,
        )
        return classes

    def constants(self, group: int) -> dict[str, object]:
        """The constexpr arguments that all kernels of tiles have in common."""
        return {
            "GROUP": group,
            "SCALE": self.scale,
            "HEADDIM": self.headdim,
            "UNIT": self.unit,
            "ACC": _triton_math.dtype(self.acc),
        }

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Batch, row and head strides in units."""
        return tuple(stride // self.unit for t in tensors for stride in t.stride()[:3])

    def forward(self) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        architecture, headdim, itemsize = self.shape
        config = kernels.forward_config(architecture, self.qlen * self.group, headdim, itemsize)
        classes = self.classify(config, self.group)
        counts, lists = _lists(classes)
        qtiles, ktiles = classes.shape[1:]
        programs = self.batch * self.nkvheads * qtiles
        splits = max(1, min(-(-_PROGRAMS // max(programs, 1)), ktiles // _SPLIT_TILES))
        out = self.q.new_empty(self.q.shape)
        lse = self.q.new_empty((self.batch, self.nheads, self.qlen), dtype=self.acc)
        parts, part_lse = out, lse
        if splits > 1:
            parts = self.q.new_empty((splits, *out.shape), dtype=self.acc)
            part_lse = self.q.new_empty((splits, *lse.shape), dtype=self.acc)
        _triton.launch(
            kernels.forward_kernel,
            (programs * splits,),
            config,
            self.q,
            self.k,
            self.v,
            *self.mask,
            counts,
            lists,
            parts,
            part_lse,
            self.batch,
            self.qlen,
            self.klen,
            self.nkvheads,
            qtiles,
            ktiles,
            splits,
            *self.strides(self.q, self.k, self.v),
            **self.constants(self.group),
        )
        if splits > 1:
            self.merge(parts, part_lse, out, lse)
        return out, lse

    def merge(self, parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
        config = kernels.merge_config(self.headdim)
        lines = lse.numel()
        _triton.launch(
            kernels.merge_kernel,
            (-(-lines // config.blocks["LINES"]),),
            config,
            parts,
            part_lse,
            out,
            lse,
            lines,
            self.qlen,
            self.nheads,
            parts.shape[0],
            HEADDIM=self.headdim,
            ACC=_triton_math.dtype(self.acc),
        )

    def mass(self, lse: Tensor, weights: Tensor) -> Tensor:
        """(batch, nheads, klen)."""
        architecture, headdim, itemsize = self.shape
        config = kernels.mass_config(architecture, self.qlen, headdim, itemsize)
        classes = self.classify(config, 1)
        qtiles, ktiles = classes.shape[1:]
        mass = self.q.new_empty((self.batch, self.nheads, self.klen), dtype=self.acc)
        _triton.launch(
            kernels.mass_kernel,
            (self.batch * self.nheads * ktiles,),
            config,
            self.q,
            self.k,
            *self.mask,
            *_lists(classes.transpose(1, 2)),
            lse,
            weights.contiguous(),
            mass,
            self.qlen,
            self.klen,
            self.nheads,
            qtiles,
            ktiles,
            *self.strides(self.q, self.k),
            **self.constants(self.group),
        )
        return mass

    def row_sums(self, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
        """What is subtracted from dP in each row, (batch, nheads, qlen)."""
        sums = torch.empty_like(lse)
        config = backward_kernels.row_sums_config(self.headdim)
        _triton.launch(
            backward_kernels.row_sums_kernel,
            (-(-lse.numel() // config.blocks["LINES"]),),
            config,
            grad_out,
            None if grad_lse is None else grad_lse.contiguous(),
            out,
            lse,
            sums,
            lse.numel(),
            self.qlen,
            self.nheads,
            *((0, 0, 0) if grad_out is None else self.strides(grad_out)),
            HEADDIM=self.headdim,
            UNIT=self.unit,
            ACC=_triton_math.dtype(self.acc),
        )
        return sums

    def backward(self, grad_out: Tensor, lse: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        architecture, headdim, itemsize = self.shape
        sizes = (architecture, self.qlen * self.group, headdim, itemsize)
        query_config, key_config = backward_kernels.query_config(*sizes), backward_kernels.key_config(*sizes)
        classes = self.classify(query_config, self.group)
        qtiles, ktiles = classes.shape[1:]
        grads = tuple(t.new_empty(t.shape) for t in (self.q, self.k, self.v))
        for kernel, config, tiles, lists, written in (
            (backward_kernels.query_kernel, query_config, qtiles, _lists(classes), grads[:1]),
            (backward_kernels.key_kernel, key_config, ktiles, _lists(classes.transpose(1, 2)), grads[1:]),
        ):
            _triton.launch(
                kernel,
                (self.batch * self.nkvheads * tiles,),
                config,
                self.q,
                self.k,
                self.v,
                grad_out,
                *self.mask,
                *lists,
                lse,
                sums,
                *written,
                self.qlen,
                self.klen,
                self.nkvheads,
                qtiles,
                ktiles,
                *self.strides(self.q, self.k, self.v, grad_out),
                **self.constants(self.group),
            )
        return grads[0], grads[1], grads[2]


def _dense_channels(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _unit(*tensors: Tensor) -> int:
    # What strides are counted in: 8 where all are multiples of it, as in anything a projection made.
    return 8 if all(stride % 8 == 0 for t in tensors for stride in t.stride()[:3]) else 1


def _sorted(rects: Tensor, batch: int) -> tuple[Tensor | None, Tensor | None]:
    # Rectangles by batch element, and where those of each begin; on the device, nothing is waited for.
    if rects.shape[0] == 0:
        return None, None
    owner, order = rects[:, 0].sort(stable=True)
    before = torch.searchsorted(owner, torch.arange(batch + 1, dtype=owner.dtype, device=owner.device))
    return rects[order].contiguous(), before


def _lists(classes: Tensor) -> tuple[Tensor, Tensor]:
    # counts (batch, tiles, 2) and lists (batch, tiles, others) of classes (batch, tiles, others), any strides.
    counts = classes.new_empty((*classes.shape[:2], 2), dtype=torch.int32)
    lists = classes.new_empty(classes.shape, dtype=torch.int32)
    config = plan_kernels.list_config()
    grid = (classes.shape[0] * classes.shape[1],)
    _triton.launch(
        plan_kernels.list_kernel, grid, config, classes, counts, lists, *classes.shape[1:], *classes.stride()
    )
    return counts, lists


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    rects: Tensor,
    weights: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, row_start, row_end, rects, scale)
    out, lse = call.forward()
    return out, lse, lse.new_empty((0,)) if weights is None else call.mass(lse, weights)


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    rects: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, row_start, row_end, rects, scale)
    if grad_out is not None:
        grad_out = _dense_channels(grad_out)
        call.unit = min(call.unit, _unit(grad_out))
    sums = call.row_sums(grad_out, grad_lse, out, lse)
    if grad_out is None:
        grad_out = torch.zeros_like(call.q, memory_format=torch.contiguous_format)
        call.unit = min(call.unit, _unit(grad_out))
    return call.backward(grad_out, lse, sums)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor row_start, Tensor row_end, Tensor rects"
_FORWARD = f"({_INPUTS}, Tensor? mass_weights, float scale) -> (Tensor out, Tensor lse, Tensor mass)"
_inference = _triton.define("mma_attention", _FORWARD, _forward)
_fwd = _triton.define("mma_attention_fwd", _FORWARD, _forward)
_bwd = _triton.define(
    "mma_attention_bwd",
    f"(Tensor? grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, float scale)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _backward,
)
_autograd.register(_inference, _fwd, _bwd)
