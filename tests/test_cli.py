"""The command line: what it prints, and that a mistake ends with status 2 and one clear line."""

import subprocess
import sys

import pytest

import mmkernels
from mmkernels.cli import main


def test_info_tells_versions_native_state_and_every_op(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for part in (mmkernels.__version__, "native library", "ssd_scan", "causal_conv1d_update", "reference"):
        assert part in said


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert mmkernels.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "--config", "no-such-recipe", "--out", "x"], "no-such-recipe"),
        (["generate", "--model", "nowhere", "--image", "x.png", "--question", "what ?"], "config.json"),
        (["demo", "--source", "no/such/folder"], "no/such/folder"),
        (["demo", "--labels", "fashon"], "fashion"),
        (["convert", "nowhere", "there"], "nowhere"),
        (["convert", "nowhere", "there", "--layout", "hovel"], "hovle"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith(f"mmkernels {arguments[0]}: ")
    assert not list(tmp_path.glob("*/report*"))


def test_help_needs_only_the_standard_library_and_torch():
    code = (
        "import sys; from mmkernels.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'transformers', 'triton', 'accelerate', 'matplotlib'} & set(sys.modules), 'heavy import'"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0
