"""Reference models, installed as `mmkernels.models`; the folder stands at the top of the repository for its readers."""

if __name__ != "mmkernels.models":
    raise ImportError(
        f"this package is mmkernels.models; it was imported as {__name__!r}. "
        "Write `import mmkernels.models` (the repository root should not be a package path of its own)."
    )
