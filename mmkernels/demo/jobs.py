"""Every arm with every seed, in processes of one thread each: matrices this small do not fill two cores together."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from mmkernels._progress import progress_bar

Runs = dict[str, dict[int, dict[str, Any]]]
Train = Callable[[Any, Any, int, Callable[[], None]], dict[str, Any]]
_progress: Any = None  # in a worker: the number of steps done by all of them, shared


def train_all(settings: Any, train: Train, steps: int, on_done: Callable[[Any, int, dict[str, Any]], None]) -> Runs:
    """Train them all; {arm key: {seed: what `train` returns}}, in the order of the settings.

    Args:
        settings: with chosen() arms, all_seeds() and workers.
        train: train(settings, arm, seed, on_step), a function of a module: other processes import it.
        steps: how often `train` calls on_step.
        on_done: called in this process with (arm, seed, result) as each one ends.
    """
    seeds = settings.all_seeds()
    jobs = [(arm, seed) for seed in seeds for arm in settings.chosen()]
    workers = min(len(jobs), settings.workers or torch.get_num_threads())
    found: dict[tuple[str, int], dict[str, Any]] = {}
    with progress_bar(len(jobs) * steps, "training") as bar:

        def done(arm: Any, seed: int, result: dict[str, Any]) -> None:
            found[arm.key, seed] = result
            bar.clear()
            on_done(arm, seed, result)

        (_one_by_one if workers == 1 else _side_by_side)(settings, train, jobs, workers, bar, done)
    return {arm.key: {seed: found[arm.key, seed] for seed in seeds} for arm in settings.chosen()}


def _one_by_one(
    settings: Any, train: Train, jobs: list[tuple[Any, int]], workers: int, bar: Any, done: Callable[..., None]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are then added in the order of the workers', so results are the same to the bit
    try:
        for arm, seed in jobs:
            done(arm, seed, train(settings, arm, seed, bar.update))
    finally:
        torch.set_num_threads(threads)


def _side_by_side(
    settings: Any, train: Train, jobs: list[tuple[Any, int]], workers: int, bar: Any, done: Callable[..., None]
) -> None:
    context = multiprocessing.get_context("spawn")
    steps = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(steps,))
    try:
        names: dict[Future[dict[str, Any]], tuple[Any, int]] = {
            pool.submit(_worker, train, settings, arm, seed): (arm, seed) for arm, seed in jobs
        }
        waiting = set(names)
        while waiting:
            ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(steps.value - bar.n)
            for future in ended:
                done(*names[future], future.result())
    finally:  # nothing is left over unless something failed: then what has not started never does
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(steps: Any) -> None:
    global _progress
    _progress = steps
    torch.set_num_threads(1)


def _worker(train: Train, settings: Any, arm: Any, seed: int) -> dict[str, Any]:
    def count() -> None:
        with _progress.get_lock():
            _progress.value += 1

    return train(settings, arm, seed, count)
