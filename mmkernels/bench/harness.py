"""A race: contestants take turns in one process, and every sample notes who else was using the processors meanwhile.

Ratios of interleaved medians survive a machine that is not quite quiet; milliseconds do not.  So a race judges samples
by the foreign load it read from /proc/stat, drops the dirty ones while clean ones can be had, and says what it did.
"""

import dataclasses
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Shares of one processor that others may use during a sample: more than this and two busy threads share a core.
FOREIGN_SHARE = 0.12
# Half the range of the samples over their median, beyond which a figure is marked.
WIDE_SPREAD = 0.15
# Other thread pools of this process (ggml's, torch's) spin for a few milliseconds after their last region.
SETTLE_SECONDS = 0.01
_STAT = Path("/proc/stat")
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One timed stretch: seconds per call, and the processors others used meanwhile (None where nobody can tell)."""

    seconds: float
    foreign: float | None
    stretch: float = 0.0

    def clean(self, threads: int, processors: int | None = None) -> bool:
        """Whether `threads` busy threads had their processors for themselves, up to the resolution of the counters."""
        if self.foreign is None:
            return True
        spare = max(0, (processors or os.cpu_count() or 1) - threads)
        # Two readings, each rounded down to a tick in several fields: about two ticks are noise.
        noise = 2 * _TICK / self.stretch if self.stretch else 0.0
        return self.foreign <= FOREIGN_SHARE + spare + noise


Sampler = Callable[[float], Sample]


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a contestant's samples amount to."""

    seconds: float
    spread: float
    samples: int
    dropped: int
    clean: bool
    watched: bool

    @property
    def marks(self) -> str:
        """'!' no clean sample, '~' wide spread, '?' a single sample."""
        return ("" if self.clean else "!") + ("~" if self.spread > WIDE_SPREAD else "") + ("?" * (self.samples == 1))


def busy_seconds(text: str | None = None) -> float | None:
    """Processor seconds spent by everybody since the machine started; None without /proc/stat."""
    if text is None:
        try:
            text = _STAT.read_text()
        except OSError:
            return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(v) for v in text.splitlines()[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK


def own_seconds() -> float:
    """Processor seconds of this process and of the children it has waited for."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def watched(stretch: Callable[[], tuple[float, float]]) -> Sample:
    """Run `stretch`, which returns seconds per call and processor seconds of helpers, and read the load around it."""
    time.sleep(SETTLE_SECONDS)
    busy, own, started = busy_seconds(), own_seconds(), time.perf_counter()
    seconds, helpers = stretch()
    length = time.perf_counter() - started
    after = busy_seconds()
    if busy is None or after is None:
        return Sample(seconds, None, length)
    return Sample(seconds, max(0.0, after - busy - (own_seconds() - own) - helpers) / length, length)


def repeat(run: Callable[[], Any], shortest: float) -> float:
    """Seconds per call of `run`, called until `shortest` seconds have passed."""
    calls, started = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        passed = time.perf_counter() - started
        if passed >= shortest:
            return passed / calls


def local_sampler(run: Callable[[], Any], calls: int = 1) -> Sampler:
    """A sampler of a function of this process, which does `calls` calls of what is measured each time."""
    return lambda shortest: watched(lambda: (repeat(run, shortest) / calls, 0.0))


def summarize(samples: list[Sample], threads: int, processors: int | None = None) -> Timing:
    """Median and spread of the clean samples, or of all of them - and then it says so - when none is clean."""
    clean = [s for s in samples if s.clean(threads, processors)]
    used = [s.seconds for s in clean or samples]
    middle = statistics.median(used)
    return Timing(
        seconds=middle,
        spread=(max(used) - min(used)) / 2 / middle,
        samples=len(used),
        dropped=len(samples) - len(used),
        clean=bool(clean),
        watched=all(s.foreign is not None for s in samples),
    )


def race(
    samplers: Mapping[str, Sampler],
    *,
    threads: int,
    rounds: int = 5,
    extra: int = 3,
    budget: float = 30.0,
    patience: float = 0.0,
    shortest: float = 0.1,
    processors: int | None = None,
) -> dict[str, Timing]:
    """Let the contestants, each already warm, take turns and summarize each.

    Args:
        samplers: name -> a function that takes one sample of at least the given length.
        threads: busy threads of every contestant.
        rounds: clean samples wanted of each.
        extra: more rounds for those who lack clean samples.
        budget: seconds for all.  A contestant that has used its share stops at one clean sample or more, so that a
            slow one neither starves the others nor goes missing; past the budget it does not wait for a clean one.
        patience: seconds of each contestant at least, so that calls of a second are sampled more than once.
        shortest: seconds of one sample.
        processors: of the machine; default: as many as there are.

    Returns:
        name -> timing, in the order given.
    """
    taken: dict[str, list[Sample]] = {name: [] for name in samplers}
    used = dict.fromkeys(samplers, 0.0)
    share, began = max(patience, budget / max(1, len(samplers))), time.perf_counter()
    for turn in range(rounds + extra):
        for name, sampler in samplers.items():
            clean = sum(s.clean(threads, processors) for s in taken[name])
            late = time.perf_counter() - began > share * len(samplers)
            if clean >= rounds or (used[name] > share and (clean or late or turn >= rounds)):
                continue
            started = time.perf_counter()
            taken[name].append(sampler(shortest))
            used[name] += time.perf_counter() - started
    return {name: summarize(samples, threads, processors) for name, samples in taken.items()}
