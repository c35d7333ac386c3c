"""Triton's interpreter, quicker: the language is patched at a launch, not again at every call inside."""

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
