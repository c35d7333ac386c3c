"""Backend "triton" of matching and merging: allocation and launches, for _triton_kernels_{matching,merging}.py."""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._gradients import wants_gradient
from mmkernels.ops.token_pruning import _autograd_merging

_triton.require()
from mmkernels import _triton_math  # noqa: E402  (needs triton, which is known to be there only now)
from mmkernels.ops.token_pruning import _triton_kernels_matching as matching  # noqa: E402
from mmkernels.ops.token_pruning import _triton_kernels_merging as merging  # noqa: E402


def bipartite_soft_matching(metric: Tensor, r: int, protect: int, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See mmkernels.bipartite_soft_matching."""
    if r == 0:  # no similarity, and so no gradient
        metric = metric.detach()
    return (_match_fwd if wants_gradient(metric) else _match)(metric, r, protect, order == "sets")


def merge_tokens(
    x: Tensor, keep_indices: Tensor, assignment: Tensor, source: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See mmkernels.merge_tokens."""
    weight = None if sizes is None else sizes.to(torch.promote_types(x.dtype, torch.float32))
    op = _merge_fwd if wants_gradient(x, weight) else _merge
    return op(x, keep_indices.long(), assignment.long(), source.long(), weight)


def _dense_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _match_impl(metric: Tensor, r: int, protect: int, sets: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, dim = metric.shape
    metric = _dense_last(metric)
    acc = _triton.accumulator(metric.dtype)
    keep, assignment, source = (metric.new_empty((batch, n), dtype=torch.int64) for n in (tokens - r, tokens, r))
    similarity = metric.new_empty((batch, r), dtype=acc)
    # Places 2 (i + evens) and 2 (j + odds) + 1 may merge; none where nothing is to be merged.
    evens, odds = ((protect + 1) // 2, protect // 2) if r else (tokens, tokens)
    rows, columns = ((tokens + 1) // 2 - evens, tokens // 2 - odds) if r else (0, 0)
    cosine = metric.new_empty((batch, rows), dtype=acc)
    link, rank = (cosine.new_empty((batch, rows), dtype=torch.int32) for _ in range(2))
    precision = _triton_math.dtype(acc)
    if r:
        inverse = metric.new_empty((batch, tokens), dtype=acc)
        strides = metric.stride()[:2]
        config = matching.lengths_config(dim)
        grid = (batch * -(-tokens // config.blocks["TOKENS"]),)
        _triton.launch(matching.lengths_kernel, grid, config, metric, inverse, tokens, dim, *strides, ACC=precision)
        config = matching.links_config(rows, columns, dim, metric.element_size())
        grid = (batch * -(-rows // config.blocks["ROWS"]),)
        places = (evens, odds, rows, columns)
        _triton.launch(
            matching.links_kernel,
            grid,
            config,
            metric,
            inverse,
            cosine,
            link,
            tokens,
            dim,
            *places,
            *strides,
            ACC=precision,
        )
        config = matching.counting_config(rows, "ROWS", "OTHERS")
        grid = (batch * -(-rows // config.blocks["ROWS"]),)
        _triton.launch(matching.ranks_kernel, grid, config, cosine, rank, source, similarity, rows, r, evens)
    config = matching.counting_config(tokens, "TOKENS", "ROWS")
    grid = (batch * -(-tokens // config.blocks["TOKENS"]),)
    _triton.launch(
        matching.plan_kernel, grid, config, link, rank, keep, assignment, tokens, rows, r, evens, odds, SETS=sets
    )
    return keep, assignment, source, similarity


def _merge_impl(
    x: Tensor, keep_indices: Tensor, assignment: Tensor, source: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = x.shape
    width, merged = keep_indices.shape[1], source.shape[1]
    x = _dense_last(x)
    acc = _triton.accumulator(x.dtype)
    out, totals = x.new_empty((batch, width, dim)), x.new_empty((batch, width), dtype=acc)
    config = merging.merge_config(width, merged, dim)
    grid = (batch * -(-width // config.blocks["SLOTS"]) * max(1, -(-dim // config.blocks["COLUMNS"])),)
    _triton.launch(
        merging.merge_kernel,
        grid,
        config,
        x,
        keep_indices.contiguous(),
        assignment.contiguous(),
        source.contiguous(),
        None if sizes is None else sizes.contiguous(),
        out,
        totals,
        tokens,
        width,
        merged,
        dim,
        *x.stride()[:2],
        ACC=_triton_math.dtype(acc),
    )
    return out, totals


def _merge_bwd_impl(
    grad_tokens: Tensor,
    grad_totals: Tensor,
    x: Tensor,
    keep_indices: Tensor,
    assignment: Tensor,
    source: Tensor,
    sizes: Tensor | None,
    totals: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = x.shape
    width, merged = keep_indices.shape[1], source.shape[1]
    x, grad = _dense_last(x), grad_tokens.contiguous()
    keep, assignment, source = keep_indices.contiguous(), assignment.contiguous(), source.contiguous()
    weight, totals = None if sizes is None else sizes.contiguous(), totals.contiguous()
    acc = {"ACC": _triton_math.dtype(totals.dtype)}
    grad_x, lines = x.new_empty(x.shape), batch * tokens
    config = merging.rows_config(dim)
    grid = (-(-lines // config.blocks["TOKENS"]) * -(-dim // config.blocks["COLUMNS"]),)
    read = (grad, assignment, weight, totals)
    _triton.launch(merging.rows_gradient_kernel, grid, config, *read, grad_x, lines, tokens, width, dim, **acc)
    if weight is None:
        return grad_x, totals.new_empty((0,))
    products, grad_sizes = totals.new_empty((batch, merged)), totals.new_empty((batch, tokens))
    config = merging.products_config(merged, dim)
    grid = (batch * -(-merged // config.blocks["SOURCES"]),)
    rows = (grad, x, keep, assignment, source)
    lengths = (tokens, width, merged, dim, *x.stride()[:2])
    _triton.launch(merging.products_kernel, grid, config, *rows, products, *lengths, **acc)
    config = merging.sizes_config(tokens, merged)
    grid = (batch * -(-tokens // config.blocks["TOKENS"]),)
    sums = (assignment, source, weight, totals, grad_totals.contiguous(), products)
    _triton.launch(merging.sizes_gradient_kernel, grid, config, *sums, grad_sizes, tokens, width, merged, **acc)
    return grad_x, grad_sizes


_MATCH = (
    "(Tensor metric, int r, int protect, bool sets)"
    " -> (Tensor keep_indices, Tensor assignment, Tensor source, Tensor similarity)"
)
_MERGE = (
    "(Tensor x, Tensor keep_indices, Tensor assignment, Tensor source, Tensor? sizes) -> (Tensor tokens, Tensor totals)"
)
_MERGE_BWD = (
    "(Tensor grad_tokens, Tensor grad_totals, Tensor x, Tensor keep_indices, Tensor assignment, Tensor source,"
    " Tensor? sizes, Tensor totals) -> (Tensor grad_x, Tensor grad_sizes)"
)
_match = _triton.define("bipartite_soft_matching", _MATCH, _match_impl)
_match_fwd = _triton.define("bipartite_soft_matching_fwd", _MATCH, _match_impl)
_merge = _triton.define("merge_tokens", _MERGE, _merge_impl)
_merge_fwd = _triton.define("merge_tokens_fwd", _MERGE, _merge_impl)
_merge_bwd = _triton.define("merge_tokens_bwd", _MERGE_BWD, _merge_bwd_impl)
_autograd_merging.register(_match, _match_fwd, _merge, _merge_fwd, _merge_bwd)
