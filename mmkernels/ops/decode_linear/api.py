"""Public function decode_linear: signature, validation, dispatch.

The linear layers of a decoder that makes one token at a time: the matrix is read once and hardly reused, so its time is
the time of reading memory.
"""

import torch

from mmkernels._checks import Sizes, Verified, floating, same_device
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import untracked_transform

_HERE = "mmkernels.ops.decode_linear"

DECODE_LINEAR = Op(
    "decode_linear",
    key="x",
    public="mmkernels.ops.decode_linear.api.decode_linear",
    backends=[
        Backend(
            "native",
            f"{_HERE}._native:decode_linear",
            ("cpu",),
            untracked_transform,
            NATIVE_PROBE,
            direct=f"{_HERE}._native:library_op",
        ),
        Backend("torch", f"{_HERE}._torch:decode_linear"),
        Backend("reference", f"{_HERE}.reference:decode_linear"),
    ],
)
_verified = Verified()


def decode_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    r"""Multiply a few rows by a large matrix: the linear layer of a decode step.

    $$y = x W^\top + b$$

    Made for 1 to some 16 rows, where the time is that of reading W. With many rows use torch.nn.functional.linear.

    Args:
        x: (..., in); float32, bfloat16, float16 or float64.
        weight: (out, in), any of the four dtypes; rows may be a view's, elements of a row are best side by side.
        bias: (out,), any of the four dtypes, or None.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        y: (..., out) in x's dtype.

    Raises:
        ShapeError: sizes disagree.
        DtypeError: a dtype outside the four.
        DeviceError: the tensors live on different devices.

    Numerics: products and sums in float32 (float64 if any operand is), rounded once on output.  The native kernel adds
        in an order that depends on `in` alone: neither the number of rows nor that of threads changes a bit.
    Cost: 2 in out flops a row; reads weight once, from memory as fast as it comes (see
        `mmkernels.layers.place_for_decode`).  Gradients are plain matrix products of torch.

    Example:
        >>> import torch, mmkernels
        >>> weight = torch.randn(512, 256).bfloat16()
        >>> mmkernels.decode_linear(torch.randn(2, 256), weight).shape
        torch.Size([2, 512])

    Source: the definition; checked against it in float64.
    """
    direct = DECODE_LINEAR.direct(backend, x)
    if direct is not None:
        try:
            return direct(x, weight) if bias is None else direct(x, weight, bias)
        except RuntimeError:
            pass  # nothing has changed: below it is said in words, or done in another way
    function = "decode_linear"
    seen = _verified.signature(x, weight, bias)
    if seen not in _verified:
        sizes = Sizes(function)
        lead = " ".join(f"axis{i}" for i in range(x.dim() - 1)) if isinstance(x, torch.Tensor) else ""
        sizes.bind("x", x, f"{lead} in", "It needs at least the channel dimension.")
        sizes.bind("weight", weight, "out in", "It is the weight of a torch.nn.Linear(in, out).")
        if bias is not None:
            sizes.bind("bias", bias, "out")
        floating(function, x=x, weight=weight, bias=bias)
        same_device(function, x=x, weight=weight, bias=bias)
        _verified.add(seen)
    return DECODE_LINEAR(backend, {"x": x, "weight": weight, "bias": bias})
