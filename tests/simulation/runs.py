"""Runs many simulations, one for each seed, and reduces a failing one to the steps that it needs."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec

from tests.simulation.simulation import Ended, simulate
from tests.simulation.steps import Step, steps_of

SECONDS_A_DAY = 86_400.0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A failing simulation, reduced."""

    seed: int
    steps: tuple[Step, ...]
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        repeat = f"make simulation SEED={self.seed} ONE=1"
        return "\n".join([f"seed {self.seed} fails; to repeat it: {repeat}", *map(str, self.steps), *self.wrong])


class Report(msgspec.Struct, kw_only=True):
    """The coverage of a number of simulations."""

    histories: int = 0
    simulated_s: float = 0.0
    calls: int = 0
    steps: Counter[str] = msgspec.field(default_factory=Counter)
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    failure: Failure | None = None
    took_s: float = 0.0

    def add(self, steps: Sequence[Step], ended: Ended) -> None:
        """Count a simulation."""
        self.histories += 1
        self.simulated_s += ended.simulated_s
        self.calls += ended.calls
        self.steps.update(step.what for step in steps)
        self.faults.update(ended.faults)

    def __str__(self) -> str:
        rate = self.histories / self.took_s if self.took_s else 0.0
        lines = [
            f"{self.histories:,} histories in {self.took_s:,.0f} s: {rate:.1f} a second",
            f"{self.simulated_s / SECONDS_A_DAY:,.1f} simulated days, {self.calls:,} calls to bucket and upstream",
        ]
        lines += [
            ", ".join(f"{what} {times:,}" for what, times in sorted(counted.items()))
            for counted in (self.steps, self.faults)
            if counted
        ]
        return "\n".join([*lines, str(self.failure) if self.failure else "nothing failed"])


def run_seeds(seeds: Iterator[int], *, workers: int = 1, until_s: float | None = None) -> Report:
    """Run the simulation of each seed until one fails or the time is over (monotonic). Several processes share them."""
    report = Report()
    began_s = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        running: dict[concurrent.futures.Future[Ended], int] = {}
        while report.failure is None:
            timely = until_s is None or time.monotonic() < until_s
            for seed in itertools.islice(seeds, 2 * workers - len(running) if timely else 0):
                running[pool.submit(run_seed, seed)] = seed
            if not running:
                break
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for one in done:
                seed = running.pop(one)
                report.add(steps_of(seed), one.result())
                if one.result().wrong and report.failure is None:
                    report.failure = pool.submit(reduce_failure, seed).result()
    report.took_s = time.monotonic() - began_s
    return report


def run_seed(seed: int) -> Ended:
    """Run the simulation of a seed."""
    return simulate(steps_of(seed), seed=seed)


def reduce_failure(seed: int) -> Failure:
    """Reduce the failing simulation of a seed."""
    steps = reduced(steps_of(seed), lambda fewer: bool(simulate(fewer, seed=seed).wrong))
    return Failure(seed=seed, steps=tuple(steps), wrong=simulate(steps, seed=seed).wrong)


def reduced(steps: list[Step], fails: Callable[[list[Step]], bool]) -> list[Step]:
    """Leave out steps, at first many at a time, as long as the rest still fails."""
    size = len(steps) // 2
    while size:
        parts = (steps[:begin] + steps[begin + size :] for begin in range(0, len(steps), size))
        fewer = next(filter(fails, parts), None)
        if fewer is None:
            size //= 2
        else:
            steps = fewer
    return steps
