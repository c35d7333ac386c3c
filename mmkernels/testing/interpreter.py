"""Triton's interpreter for tests: quicker, and rounding to bfloat16 as a GPU does."""

from typing import Any


def quicken() -> None:
    """Let functions that an interpreted kernel calls run without patching triton.language once more.

    The interpreter replaces the language's built-ins when a kernel is launched and again whenever it calls a
    `@triton.jit` function, `tl.sum` and `tl.zeros` included, a third of its time.  The module triton.language.core,
    which only Triton's own functions look into, stays patched from the first such call on, as it does without this.
    Call it once, when TRITON_INTERPRET=1; for tests.
    """
    from triton.language import core
    from triton.runtime import interpreter

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if core.is_builtin(core.load):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def round_to_nearest() -> None:
    """Let conversions from float32 to bfloat16 round to the nearest, halves to even, as compiled kernels do.

    The interpreter cuts the low bits off, twice the error: gradients that are within their bar on a GPU, and are in
    float16, which numpy rounds, would be over it.  Call it once, when TRITON_INTERPRET=1; for tests.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16) or rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(values, source, target, rounding_mode)
        bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        # A carry must not turn NaN into infinity; its quiet bit may be among those kept.
        return np.where(np.isnan(values), bits >> 16 | 0x40, nearest).astype(np.uint16)

    interpreter._convert_float = convert_
