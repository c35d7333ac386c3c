"""Modality-mutual attention on real scans: how fast six ways of attending learn the same questions."""

from mmkernels.demo.mma.arms import ARMS, Arm
from mmkernels.demo.mma.run import run_mma_demo
from mmkernels.demo.mma.settings import MMASettings

__all__ = ["ARMS", "Arm", "MMASettings", "run_mma_demo"]
