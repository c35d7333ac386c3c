"""Contestants: everybody is checked before being timed, a wrong one is refused, a missing one says why."""

import dataclasses
import io
import tarfile
import zipfile

import pytest
import torch

from mmkernels.bench import ops, problems
from mmkernels.bench.ops import OPS
from mmkernels.bench.peers import fetched, ggml
from mmkernels.bench.problems import Contestant, Prepared, Unavailable
from mmkernels.bench.shapes import Cell

# Fetched over the network, or compiled for many seconds: test_fetched_and_compiled_peers takes them.
HEAVY = ("flex_attention", "torch.compile", "ssd_", "torchmamba", "selective_scan_ref")
DECODE = ("ssd_update", "causal_conv1d_update")
SHORT = {"scan2d_bidirectional": 130, "scan2d_cross": 35, "merge_tokens": 100}  # their oracles go token by token


def cells(backward=False):
    for op, race in OPS.items():
        for shape in ("130m", "mmmamba", "training", "aki", "aki-short-d128", "bidir", "kv-cache", "clip-l"):
            if shape in race.shapes and not (
                backward and (op in DECODE or shape == "clip-l" or op in ("mixer", "mma_attention_decode"))
            ):
                length = 1 if op in DECODE else SHORT.get(op, 20 if shape == "training" else 512)
                yield Cell(op, shape, length, backward=backward)


def error_of(cell, contestant):
    race = OPS[cell.op]
    with torch.set_grad_enabled(cell.backward):
        return problems.require_right(cell, contestant.prepare, race.build, race.truth)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", [*cells(), *cells(backward=True)], ids=str)
def test_contestants_are_right_or_say_why_not(cell, dtype):
    cell = dataclasses.replace(cell, dtype=dtype)
    for contestant in OPS[cell.op].contestants:
        if contestant.name.startswith(HEAVY) or contestant.tuned_malloc or contestant.objection(cell):
            continue
        try:
            error = error_of(cell, contestant)
        except Unavailable as why:
            # A peer may be missing here; nobody may be wrong, and what needs no compiler is always there.
            absent = str(why)
        else:
            absent = ""
            assert error <= problems.TOLERANCE[dtype]
        assert not absent or contestant.name != "mmkernels, torch backend"
        assert "error of" not in absent
        assert "finite" not in absent


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["130m", "mmmamba"])
def test_fetched_and_compiled_peers(shape):
    cell = Cell("ssd_scan", shape, 512)
    for contestant in OPS["ssd_scan"].contestants:
        if contestant.name.startswith(HEAVY):
            try:
                error = error_of(cell, contestant)
            except Unavailable as why:
                absent = str(why)
            else:
                absent = "not installed"
                assert error <= problems.TOLERANCE["float32"]
            assert any(word in absent for word in ("not installed", "not importable", "compiler"))


def test_ggml_runs_where_it_is_installed():
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed (mmkernels[bench-peers])")
    for op, length in (("ssd_scan", 512), ("ssd_update", 1), ("causal_conv1d", 512)):
        contestant = next(c for c in OPS[op].contestants if c.name.startswith("ggml"))
        assert error_of(Cell(op, "130m", length), contestant) < 1e-5


def test_ggml_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)
    ggml._library.cache_clear()
    with pytest.raises(Unavailable, match="llama-cpp-python is not installed; pip install"):
        error_of(Cell("ssd_scan", "130m", 512), OPS["ssd_scan"].contestant("ggml_ssm_scan"))
    ggml._library.cache_clear()


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_contestant_is_refused(backward):
    cell = Cell("gated_rms_norm", "130m", 64, backward=backward)

    def off_by_a_thousandth(problem):
        right = OPS["gated_rms_norm"].contestant("mmkernels, torch backend").prepare(problem)
        # x^1.001 instead of x: output and gradients change
        return Prepared(lambda: right.run().mul(1.0) + 1e-3 * problem.args["x"].square())

    def infinite(problem):
        a = problem.args
        return Prepared(lambda: a["x"] * a["z"] * a["weight"] / 0.0)

    with pytest.raises(Unavailable, match=r"the error of its (results|gradients) against float64 is \d"):
        error_of(cell, Contestant("wrong", off_by_a_thousandth))
    with pytest.raises(Unavailable, match="are not finite"):
        error_of(cell, Contestant("worse", infinite))


def test_objections_are_known_before_anything_runs():
    scan = OPS["ssd_scan"]
    with pytest.raises(Unavailable, match="takes float32 only"):
        ops.prepare(Cell("ssd_scan", "130m", 512, "bfloat16"), scan.contestant("ggml_ssm_scan"))
    with pytest.raises(Unavailable, match="no backward"):
        ops.prepare(Cell("ssd_scan", "130m", 512, backward=True), scan.contestant("ggml_ssm_scan"))
    with pytest.raises(Unavailable, match="many seconds"):
        ops.prepare(Cell("ssd_scan", "2.7b", 8192), scan.contestant("selective_scan_ref"))


def test_whoever_swaps_two_directions_is_refused():
    cell = Cell("scan2d_bidirectional", "130m", 12)

    def swapped(problem):
        for name in ("conv_weight", "A_log"):
            problem.args[name] = problem.args[name].flip(0)
        return OPS[cell.op].contestant("mmkernels, torch backend").prepare(problem)

    with torch.no_grad(), pytest.raises(Unavailable, match="the error of its results"):
        error_of(cell, Contestant("swapped", swapped))


def test_all_layers_are_updated_in_rotation():
    cell = Cell("ssd_update", "training", 1)
    prepared, error = ops.prepare(cell, OPS["ssd_update"].contestants[1])
    assert prepared.calls == cell.sizes.layers
    assert error < 1e-5


def archive(path, names):
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name in names:
                wheel.writestr(name, "X = 1\n")
    else:
        with tarfile.open(path, "w:gz") as bundle:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 6
                bundle.addfile(info, io.BytesIO(b"X = 1\n"))
    return path


@pytest.mark.parametrize("name", ["peer-1.tar.gz", "peer-1.whl"])
def test_only_the_python_files_of_the_package_are_unpacked(tmp_path, name):
    names = ["peer-1/peer/__init__.py", "peer-1/peer/sub/core.py", "peer-1/setup.py", "peer-1/peer/kernel.cu"]
    source = archive(tmp_path / name, [*names, "peer-1/peer/../../../evil.py"])
    fetched.unpack(source, "peer", tmp_path / "out")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["peer/__init__.py", "peer/sub/core.py"]
    with pytest.raises(Unavailable, match="holds no package other"):
        fetched.unpack(source, "other", tmp_path / "none")


def test_what_pip_cannot_get_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MMKERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(Unavailable, match=r"not installed: pip download torchmamba==.* failed"):
        fetched.folder("torchmamba")
    assert not list((tmp_path / "peers").iterdir())


def test_a_fetched_module_leaves_nothing_for_others_to_find(tmp_path, monkeypatch):
    import sys

    home = tmp_path / "peers" / f"torchmamba-{fetched.VERSIONS['torchmamba']}"
    (home / "torchmamba" / "deep").mkdir(parents=True)
    (home / "torchmamba" / "__init__.py").write_text("raise RuntimeError('wants CUDA')\n")
    (home / "torchmamba" / "deep" / "core.py").write_text("from torchmamba.deep import other\nimport cuda_part\n")
    (home / "torchmamba" / "deep" / "other.py").write_text("X = 3\n")
    monkeypatch.setenv("MMKERNELS_CACHE", str(tmp_path))
    fetched.module.cache_clear()
    found = fetched.module("torchmamba", "torchmamba.deep.core", stand_ins=("cuda_part",))
    assert found.other.X == 3
    assert not [name for name in sys.modules if name.startswith(("torchmamba", "cuda_part"))]
    fetched.module.cache_clear()
