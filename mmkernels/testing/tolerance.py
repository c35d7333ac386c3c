"""The error bar of every numeric test, derived instead of chosen.

A backend may be wrong by at most twice what a plain implementation in the same dtype is wrong, both measured against
float64, plus one rounding of the output.  The rule is flash-attention's; the band keeps exact cases from asking
for zero.
"""

import torch


def error_of(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute error in units of the truth's largest magnitude (1 when the truth is all zero)."""
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} where {tuple(truth.shape)} was expected")
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double(), truth.detach().double()
    # The same infinity on both sides (the lse of a row without keys) is exact.
    exact = truth.isinf() & (actual == truth)
    actual, truth = actual.masked_fill(exact, 0), truth.masked_fill(exact, 0)
    if not torch.isfinite(actual).all() and torch.isfinite(truth).all():
        return float("inf")
    scale = truth.abs().max().item() or 1.0
    return (actual - truth).abs().max().item() / scale


def rounding_band(dtype: torch.dtype, terms: int = 1) -> float:
    """The relative error of `terms` roundings to `dtype`."""
    return terms * torch.finfo(dtype).eps


def assert_within(
    name: str,
    actual: torch.Tensor,
    truth: torch.Tensor,
    peer: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    terms: int = 1,
    summands: int = 0,
) -> None:
    """Fail unless err(actual) <= 2 * err(peer) + rounding_band(dtype, terms), both against the float64 truth.

    Of two float32 sums of n random products, the luckier one can be exact while the other is sqrt(n) roundings off (a
    random walk), so a peer alone is no measure of a sum over many tokens: `summands` adds that much to the bar.

    Args:
        name: of the tensor, for the message.
        actual: result under test.
        truth: the float64 oracle's result.
        peer: a plain implementation's result in the dtype under test; None leaves only the band.
        dtype: whose rounding the band is made of; default actual.dtype.
        terms: roundings in the band: 1 for an output; say why when it is more.
        summands: products that are accumulated in float32, in an order of the backend's own, into one element.
    """
    bar = rounding_band(dtype or actual.dtype, terms) + summands**0.5 * rounding_band(torch.float32)
    bar += 0.0 if peer is None else 2.0 * error_of(peer, truth)
    err = error_of(actual, truth)
    assert err <= bar, f"{name}: error {err:.3e} against float64 exceeds the bar {bar:.3e}"
