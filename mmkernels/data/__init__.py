"""Real small tasks for the demo, the tests and the benchmarks."""

from mmkernels.data.canvas import CanvasTask
from mmkernels.data.idx import read_idx, read_idx_folder
from mmkernels.data.scoring import answer_accuracy, canvas_loss

__all__ = ["CanvasTask", "answer_accuracy", "canvas_loss", "read_idx", "read_idx_folder"]
