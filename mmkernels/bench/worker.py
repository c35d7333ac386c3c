"""One contestant in a process of its own: another allocator, its own peak memory, or its very first call.

`python -m mmkernels.bench.worker` reads one JSON order per line and answers each with one JSON line.
"""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkernels import _env
from mmkernels.bench.harness import Sample, Sampler, repeat, watched
from mmkernels.bench.problems import PEER_ERRORS, Unavailable, failure
from mmkernels.bench.shapes import Cell

# The allocator keeps blocks up to this size instead of handing large ones back to the system and paging them in anew.
_KEEP = str(1 << 40)
TUNED = {"MALLOC_MMAP_THRESHOLD_": _KEEP, "MALLOC_TRIM_THRESHOLD_": _KEEP, "MALLOC_TOP_PAD_": str(256 << 20)}


class Worker:
    """The parent's end of a child that prepares contestants."""

    def __init__(self, environment: dict[str, str] | None = None):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mmkernels.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_env.child_environment(**(environment or {})),
        )

    def ask(self, order: str, **details: Any) -> dict[str, Any]:
        """Send an order and wait for its answer.

        Raises:
            Unavailable: with the child's reason.
        """
        pipes = self._process.stdin, self._process.stdout
        try:
            print(json.dumps({"order": order, **details}), file=pipes[0], flush=True)
            line = pipes[1].readline() if pipes[1] else ""
        except BrokenPipeError:
            line = ""
        if not line:
            raise Unavailable(f"its process died with status {self._process.wait()}")
        answer = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer

    def sampler(self, contestant: str) -> Sampler:
        """Samples of one prepared contestant taken in the child, watched from here."""

        def take(shortest: float) -> Sample:
            def stretch() -> tuple[float, float]:
                answer = self.ask("sample", contestant=contestant, shortest=shortest)
                return answer["seconds"], answer["processor"]

            return watched(stretch)

        return take

    def close(self) -> None:
        """End the child."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin:
                self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    # Answers go to the real standard output; whatever libraries print goes to the standard error.
    answers, sys.stdout = sys.stdout, sys.stderr
    state: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = _ORDERS[order.pop("order")](state, **order)
        except Unavailable as why:
            answer = {"unavailable": str(why)}
        except PEER_ERRORS as error:
            answer = {"unavailable": failure(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _prepare(state: dict[str, Any], cell: dict[str, Any], contestant: str, checked: bool = True) -> dict[str, Any]:
    import torch

    from mmkernels.bench.ops import OPS, prepare

    where = Cell(**cell)
    torch.set_num_threads(where.threads)
    torch.set_grad_enabled(where.backward)
    prepared, error = prepare(where, OPS[where.op].contestant(contestant), checked=checked)
    if state.get("cell") != where:
        state.clear()  # contestants of other cells keep their memory no longer
    state["cell"], state[contestant] = where, prepared
    return {"error": error}


def _sample(state: dict[str, Any], contestant: str, shortest: float) -> dict[str, Any]:
    started, prepared = time.process_time(), state[contestant]
    seconds = repeat(prepared.run, shortest) / prepared.calls
    return {"seconds": seconds, "processor": time.process_time() - started}


def _memory(state: dict[str, Any], contestant: str) -> dict[str, Any]:
    """Bytes of resident memory that one call needs beyond what the process held before it, its output included."""
    clear = Path("/proc/self/clear_refs")
    _give_back()
    try:
        clear.write_text("5")  # forget the peak so far
    except OSError as error:
        raise Unavailable(f"the peak of resident memory cannot be read here: {error}") from error
    before = _resident("VmRSS")
    state[contestant].run()
    return {"bytes": max(0, _resident("VmHWM") - before)}


def _give_back() -> None:
    """Return what the check and the inputs left in the allocator, or a call could live on memory nobody counts."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _first_call(state: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds of an op's first call, of the processor in it, and of the second; torch and the inputs are there."""
    import torch

    from mmkernels.bench import ops

    where = Cell(**cell)
    torch.set_num_threads(where.threads)
    race = ops.OPS[where.op]
    with torch.no_grad():
        problem = race.build(where)
        for name in ("states", "weights", "biases"):
            problem.args.update({name: problem.args[name][:1]} if name in problem.args else {})
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # torch's own first call is not ours
        marks, spent = [time.perf_counter()], time.process_time()
        prepared = race.contestants[0].prepare(problem, backend=None)  # type: ignore[call-arg]
        prepared.run()
        marks.append(time.perf_counter())
        spent = time.process_time() - spent
        prepared.run()
        marks.append(time.perf_counter())
    return {"first": marks[1] - marks[0], "processor": spent, "second": marks[2] - marks[1]}


_ORDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare": _prepare,
    "sample": _sample,
    "memory": _memory,
    "first_call": _first_call,
}

if __name__ == "__main__":
    _serve()
