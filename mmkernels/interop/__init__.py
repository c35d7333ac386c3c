"""Seams to other libraries, one file each.  Nothing here is imported by `import mmkernels`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkernels.interop.mma import make_modality_mutual as make_modality_mutual

__all__ = ["make_modality_mutual"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mmkernels.interop import mma

        return getattr(mma, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
