"""The main job: train a quadratic teacher on real scans, make it linear, measure both, keep the models."""

from mmkernels.demo.run import run_demo
from mmkernels.demo.settings import DemoSettings

__all__ = ["DemoSettings", "run_demo"]
