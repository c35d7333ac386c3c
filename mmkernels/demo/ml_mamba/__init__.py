"""A tiny ML-Mamba on real scans: a language model that knows the questions learns to see through a scan connector."""

from mmkernels.demo.ml_mamba.arms import ARMS, Arm
from mmkernels.demo.ml_mamba.run import compare_connectors, run_ml_mamba_demo
from mmkernels.demo.ml_mamba.settings import DEMO, MLMambaSettings

__all__ = ["ARMS", "DEMO", "Arm", "MLMambaSettings", "compare_connectors", "run_ml_mamba_demo"]
