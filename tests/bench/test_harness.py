"""The race: turns, medians, dirty samples, slow contestants; with samplers that say what they are told to."""

import time
from types import SimpleNamespace

import pytest

from mmkernels.bench import harness
from mmkernels.bench.harness import Sample, Timing, race, summarize

CLEAN, DIRTY = 0.0, 1.5


def scripted(*samples):
    """A sampler that hands out (seconds, foreign) pairs in turn, the last one for ever; and the list of its calls."""
    calls = []

    def take(shortest):
        calls.append(shortest)
        seconds, foreign = samples[min(len(calls), len(samples)) - 1]
        return Sample(seconds, foreign, stretch=0.1)

    return take, calls


def test_busy_seconds_counts_everything_but_idle_and_waiting():
    ticks = 1.0 / harness._TICK
    text = f"cpu {int(3 * ticks)} 0 {int(2 * ticks)} 999999 888888 0 0 0 77 66\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert harness.busy_seconds(text) == pytest.approx(5.0)


def test_a_sample_is_clean_while_others_leave_the_processors_it_needs():
    noise = 2 * harness._TICK / 0.1
    below, above = harness.FOREIGN_SHARE + noise - 1e-6, harness.FOREIGN_SHARE + noise + 1e-3
    assert Sample(1.0, below, 0.1).clean(threads=2, processors=2)
    assert not Sample(1.0, above, 0.1).clean(threads=2, processors=2)
    assert Sample(1.0, 1 + below, 0.1).clean(threads=1, processors=2)  # one thread does not mind one neighbour
    assert not Sample(1.0, 1 + above, 0.1).clean(threads=1, processors=2)
    assert Sample(1.0, None, 0.1).clean(threads=2, processors=2)  # nobody can tell


def test_dirty_samples_are_dropped_while_there_are_clean_ones():
    samples = [Sample(1.0, CLEAN, 1), Sample(9.0, DIRTY, 1), Sample(1.2, CLEAN, 1), Sample(1.1, CLEAN, 1)]
    timing = summarize(samples, threads=2, processors=2)
    assert (timing.seconds, timing.samples, timing.dropped, timing.clean) == (1.1, 3, 1, True)
    assert timing.spread == pytest.approx(0.1 / 1.1)
    assert timing.marks == ""


def test_a_race_without_clean_samples_says_so():
    timing = summarize([Sample(1.0, DIRTY, 1), Sample(2.0, DIRTY, 1)], threads=2, processors=2)
    assert (timing.seconds, timing.samples, timing.dropped) == (1.5, 2, 0)
    assert timing.marks == "!~"


def test_an_unwatched_machine_is_told():
    assert not summarize([Sample(1.0, None, 1)], threads=1).watched
    assert summarize([Sample(1.0, None, 1)], threads=1).marks == "?"


def test_contestants_take_turns():
    order = []

    def named(name):
        def take(shortest):
            order.append(name)
            return Sample(1.0, CLEAN, 1)

        return take

    race({"a": named("a"), "b": named("b")}, threads=1, rounds=3)
    assert "".join(order) == "ababab"


def test_whoever_lacks_clean_samples_gets_more_rounds():
    lucky, lucky_calls = scripted((1.0, CLEAN))
    unlucky, unlucky_calls = scripted((5.0, DIRTY), (5.0, DIRTY), (2.0, CLEAN), (2.0, CLEAN), (2.0, CLEAN))
    found = race({"lucky": lucky, "unlucky": unlucky}, threads=2, rounds=3, extra=3, processors=2)
    assert (len(lucky_calls), len(unlucky_calls)) == (3, 5)
    assert (found["unlucky"].seconds, found["unlucky"].dropped) == (2.0, 2)


def test_extra_rounds_end():
    take, calls = scripted((1.0, DIRTY))
    assert not race({"a": take}, threads=2, rounds=2, extra=3, processors=2)["a"].clean
    assert len(calls) == 5


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def lasting(clock, seconds, foreign=CLEAN):
    def take(shortest):
        clock[0] += seconds
        return Sample(seconds, foreign, seconds)

    return take


def test_a_slow_contestant_neither_starves_the_others_nor_goes_missing(clock):
    found = race({"slow": lasting(clock, 6.0), "fast": lasting(clock, 0.1)}, threads=1, rounds=4, budget=10.0)
    assert (found["slow"].samples, found["slow"].marks) == (1, "?")
    assert found["fast"].samples == 4


def test_patience_gives_calls_of_seconds_more_than_one_sample(clock):
    contestants = {"slow": lasting(clock, 14.0), "ours": lasting(clock, 1.5)}
    assert race(contestants, threads=1, budget=8.0, processors=2)["ours"].samples == 3  # its half of the budget
    assert race(contestants, threads=1, budget=2.0, processors=2)["ours"].samples == 1
    found = race(contestants, threads=1, budget=2.0, patience=4.0, processors=2)
    assert (found["slow"].samples, found["ours"].samples) == (1, 3)


def test_past_the_budget_everybody_has_a_sample_and_nobody_waits_for_clean_ones(clock):
    contestants = {name: lasting(clock, 4.0, DIRTY) for name in "abc"}
    found = race(contestants, threads=2, rounds=3, extra=3, budget=10.0, processors=2)
    assert [timing.samples for timing in found.values()] == [1, 1, 1]
    assert not any(timing.clean for timing in found.values())


def test_repeat_and_calls_give_seconds_of_one_call():
    counted = []
    seconds = harness.repeat(lambda: (counted.append(1), time.sleep(0.002)), shortest=0.02)
    assert 0.002 <= seconds < 0.02
    assert 2 <= len(counted) <= 10
    sample = harness.local_sampler(lambda: time.sleep(0.02), calls=10)(0.0)
    assert 0.002 <= sample.seconds < 0.01
    assert sample.stretch >= 0.02


def test_foreign_load_is_what_others_used(monkeypatch):
    busy, own = iter([100.0, 100.9]), iter([10.0, 10.2])
    monkeypatch.setattr(harness, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(harness, "own_seconds", lambda: next(own))
    sample = harness.watched(lambda: (time.sleep(0.1), (1.0, 0.3))[1])  # 0.9 busy, 0.2 ours, 0.3 a helper's
    assert sample.foreign == pytest.approx(0.4 / sample.stretch)
    assert sample.seconds == 1.0


def test_a_timing_survives_json():
    timing = Timing(seconds=1.0, spread=0.2, samples=3, dropped=1, clean=True, watched=True)
    from mmkernels.bench.tables import timing as read

    assert read({**vars(timing), "error": 0.0}) == timing
