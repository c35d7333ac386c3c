"""Faults planted in the source of Triton kernels."""

import importlib.util
import inspect

import pytest
import torch

from mmkernels import _triton
from mmkernels.testing import CASES
from mmkernels.testing.contract import check_error_bar

if _triton.probe() is not None:
    collect_ignore_glob = ["test_*_triton.py"]


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """plant(backend, name, old, new): backend.<name>, a module of kernels, is recompiled with `old` replaced by `new`.

    Triton reads the source of what it compiles or interprets from its file, so the changed module is a file of its own.
    """

    def plant_(backend, name, old, new):
        kernels = getattr(backend, name)
        source = inspect.getsource(kernels)
        assert old in source, f"nothing to replace: {old!r} is not in {kernels.__name__}"
        path = tmp_path / f"{name}_planted.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(f"{kernels.__name__}_planted", path)
        planted = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(planted)
        monkeypatch.setattr(backend, name, planted)
        return planted

    return plant_


@pytest.fixture
def caught():
    """caught(op, case): whether the contract's error bar objects to the Triton backend on that case, in float32."""
    device = "cpu" if _triton.interpreting() else "cuda"

    def caught_(op, case):
        (chosen,) = [c for c in CASES[op] if c.id == case]
        try:
            check_error_bar(chosen, "triton", torch.float32, device)
        except AssertionError as objection:
            if "exceeds the bar" in str(objection):  # the numbers are wrong, and nothing else
                return True
            raise
        return False

    return caught_
