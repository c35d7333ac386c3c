"""Pruning visual tokens of a small trained model: which pruner keeps the right ones."""

from mmkernels.demo.pruning.arms import ARMS, Arm
from mmkernels.demo.pruning.run import run_pruning_demo
from mmkernels.demo.pruning.settings import PruningSettings

__all__ = ["ARMS", "Arm", "PruningSettings", "run_pruning_demo"]
