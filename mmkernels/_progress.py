"""Progress bars: lively in a terminal, a line now and then in a log, silent in CI."""

import sys
from typing import Any

from mmkernels._env import running_in_ci


def progress_bar(total: int, description: str, *, initial: int = 0, show: bool = True) -> Any:
    """A tqdm bar over steps; use it as a context manager and call `update()`."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="step",
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        disable=not show or running_in_ci(),
    )
