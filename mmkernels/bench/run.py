"""Runs a plan: race by race, each saved as it ends, so that a run that was stopped goes on where it was."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmkernels.bench import limits
from mmkernels.bench.harness import Sampler, Timing, local_sampler, race
from mmkernels.bench.ops import OPS, OURS, prepare
from mmkernels.bench.plans import Plan, taking_part
from mmkernels.bench.problems import PEER_ERRORS, Contestant, Unavailable, failure
from mmkernels.bench.shapes import Cell
from mmkernels.bench.worker import TUNED, Worker
from mmkernels.errors import ConfigError

FORMAT = 1
_PACKAGES = ("torch", "transformers", "llama_cpp_python", "triton", "numpy")


class Results:
    """results.json: what has been measured so far, written anew and whole after every race.

    With `again` nothing counts as measured until this run has measured it; results of other cells stay, if they come
    from this machine and these versions.
    """

    def __init__(self, folder: Path, *, again: bool = False):
        self.folder, self.path, self.again = folder, folder / "results.json", again
        self.measured: set[tuple[str, str]] = set()
        self.content: dict[str, Any] = {
            "format": FORMAT, "machine": machine(), "commands": [], "races": {}, "memory": {}, "first_call": {}
        }  # fmt: skip
        if self.path.exists():
            self._continue()

    def _continue(self) -> None:
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            if self.again:
                return
            raise ConfigError(
                f"bench: {self.path} must hold results; got no JSON ({error}). Delete it or pass --again."
            ) from error
        if earlier.get("format") != FORMAT or earlier.get("machine") != self.content["machine"]:
            if self.again:
                return
            raise ConfigError(
                f"bench: {self.path} must come from this machine and these versions to be continued; got "
                f"{earlier.get('machine')}. Pass --again to start anew, or another --out."
            )
        self.content = earlier

    def save(self) -> None:
        """Write the file; a reader or a crash sees the old one or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, self.path)

    def note(self, command: str) -> None:
        """Remember a command that contributed."""
        if command not in self.content["commands"]:
            self.content["commands"].append(command)
            self.save()

    def has(self, section: str, cell: Cell) -> bool:
        """Whether that was measured already; with `again`, in this run."""
        return (section, cell.id) in self.measured if self.again else cell.id in self.content[section]

    def add(self, section: str, cell: Cell, found: dict[str, Any]) -> None:
        """Keep and save one result."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        self.content[section][cell.id] = {"cell": dataclasses.asdict(cell), "date": today, **found}
        self.measured.add((section, cell.id))
        self.save()


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, its count, versions."""
    from importlib import metadata

    import mmkernels

    versions = {"mmkernels": mmkernels.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"processor": processor(), "processors": os.cpu_count(), "system": platform.system(), "versions": versions}


def processor() -> str:
    """The processor's own name, with its family and model where the name says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(reversed([[p.strip() for p in line.split(":", 1)] for line in lines if ":" in line]))
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def carry_out(plan: Plan, results: Results) -> None:
    """Do what the plan asks for and the results lack."""
    from mmkernels._progress import progress_bar

    races = [c for c in plan.cells if not results.has("races", c)]
    memory = [c for c in plan.memory if not results.has("memory", c)]
    first_calls = [c for c in plan.first_calls if not results.has("first_call", c)]
    with progress_bar(len(races) + len(memory) + len(first_calls), "bench") as bar, _tuned_worker() as tuned:

        def step(section: str, cell: Cell, found: dict[str, Any]) -> None:
            results.add(section, cell, found)
            bar.update()

        for cell in first_calls:
            bar.set_postfix_str(f"first call {cell.op}")
            step("first_call", cell, first_call(cell))
        for cell in races:
            bar.set_postfix_str(cell.id)
            step("races", cell, run_race(cell, plan, tuned))
        for cell in memory:
            bar.set_postfix_str(f"memory {cell.id}")
            step("memory", cell, peak_memory(cell, taking_part(plan, cell, memory=True)))
    results.save()


@contextlib.contextmanager
def _tuned_worker() -> Iterator[list[Worker]]:
    """A list that holds the child with the tuned allocator once somebody has asked for it."""
    started: list[Worker] = []
    try:
        yield started
    finally:
        for worker in started:
            worker.close()


def run_race(cell: Cell, plan: Plan, tuned: list[Worker]) -> dict[str, Any]:
    """One race: its limits and its entries, timed or with the reason why not."""
    op = OPS[cell.op]
    entries: dict[str, dict[str, Any]] = {}
    samplers: dict[str, Sampler] = {}
    torch.set_num_threads(cell.threads)
    with torch.set_grad_enabled(cell.backward):
        for name in taking_part(plan, cell):
            contestant = op.contestant(name)
            try:
                samplers[name], entries[name] = _ready(cell, contestant, tuned)
            except Unavailable as why:
                entries[name] = {"why": str(why)}
            except PEER_ERRORS as error:
                if name.startswith(OURS):
                    raise
                entries[name] = {"why": failure(error)}
        for name in op.limits:
            run = limits.limit(name)
            run()
            samplers[f"limit {name}"] = local_sampler(run)
        timings = race(
            samplers,
            threads=cell.threads,
            rounds=plan.rounds,
            budget=plan.budget,
            patience=plan.patience,
            shortest=plan.shortest,
        )
    for name in entries:
        if name in timings:
            entries[name] |= _facts(timings[name])
    found = {name: _facts(timings[f"limit {name}"]) for name in op.limits}
    for name, facts in found.items():
        facts["rate"] = limits.WORK[name] / facts["seconds"]
    return {"limits": found, "entries": entries}


def _ready(cell: Cell, contestant: Contestant, tuned: list[Worker]) -> tuple[Sampler, dict[str, Any]]:
    """A warm contestant and the error it was found to have."""
    if contestant.tuned_malloc:
        objection = contestant.objection(cell)
        if objection:
            raise Unavailable(objection)
        if not tuned:
            tuned.append(Worker(TUNED))
        answer = tuned[0].ask("prepare", cell=dataclasses.asdict(cell), contestant=contestant.name)
        sampler = tuned[0].sampler(contestant.name)
        sampler(0.0)
        return sampler, {"error": answer["error"]}
    prepared, error = prepare(cell, contestant)
    prepared.run()
    return local_sampler(prepared.run, prepared.calls), {"error": error}


def _facts(timing: Timing) -> dict[str, Any]:
    return dataclasses.asdict(timing)


def peak_memory(cell: Cell, names: list[str]) -> dict[str, Any]:
    """Peak memory of one call of each contestant beyond what its fresh process held, its output included."""
    entries: dict[str, dict[str, Any]] = {}
    for name in names:
        worker = Worker()
        try:
            worker.ask("prepare", cell=dataclasses.asdict(cell), contestant=name)
            entries[name] = worker.ask("memory", contestant=name)
        except Unavailable as why:
            entries[name] = {"why": str(why)}
        finally:
            worker.close()
    return {"entries": entries}


def first_call(cell: Cell) -> dict[str, Any]:
    """Seconds of the first call of an op in a fresh process, the native library being built already."""
    worker = Worker()
    try:
        return worker.ask("first_call", cell=dataclasses.asdict(cell))
    except Unavailable as why:
        return {"why": str(why)}
    finally:
        worker.close()


def build_first() -> float:
    """Seconds to have the native library: nothing to wait for unless it must be compiled now."""
    from mmkernels import _native
    from mmkernels._dispatch import BackendUnavailable

    started = time.perf_counter()
    with contextlib.suppress(BackendUnavailable):
        _native.require()
    return time.perf_counter() - started
