"""Distils the tiny teacher; started by the tests as a process of its own, alone or by torchrun.

usage: train_tiny.py OUT MICRO_BATCH [--slow]
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import tiny_recipe, tiny_teacher

from mmkernels.data import CanvasTask
from mmkernels.distill import linearize, run


def main() -> None:
    torch.set_num_threads(1)
    out, micro_batch, slow = Path(sys.argv[1]), int(sys.argv[2]), "--slow" in sys.argv
    source = CanvasTask().source()

    def data(index: int, size: int) -> dict[str, torch.Tensor]:
        if slow:
            time.sleep(0.05)  # leaves the test time to kill this process between two steps
        return source(index, size)

    teacher = tiny_teacher()
    recipe = tiny_recipe(micro_batch=micro_batch, checkpoint_every=2)
    run(recipe, teacher, linearize(teacher), data, output_dir=out)


if __name__ == "__main__":
    main()
