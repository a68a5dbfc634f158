"""The schedule of a simulation: what users, the upstream, operators and faults do, and when. A seed makes it."""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Callable

import msgspec

from shared.domain.topics import GROUPS
from tests.fakes.builders import Trip
from tests.simulation.upstream import File

DATES = (dt.date(2024, 5, 1), dt.date(2024, 5, 2), dt.date(2024, 6, 1))
CITIES = (1, 2, 3, 4)
COUNTRIES = ("Armenia", "Brasil", "Chad")
GOOD_FILES: tuple[tuple[Trip, ...], ...] = (
    (),
    (Trip(passengers=30, delay_ms=61_500), Trip(passengers=0, delay_ms=0, accident=True)),
    (Trip(passengers=31, delay_ms=60_000),),
    (Trip(passengers=7, delay_ms=1), Trip(passengers=8, delay_ms=2), Trip(passengers=9, delay_ms=3)),
)
BROKEN_FILE = b'[{"passengers":1}]'
FAULT_S_MAX = 1_200.0
GC_AGE_S = 1_800.0
"""Faults last less, so a worker that held a raw object has written its manifest before gc may delete the object."""
SUSPENDED_SHARE = 0.06
FAR_SHARE = 0.1
PROCESSES = ("planner-1", "planner-2", "worker-1", "worker-2", "aggregate-1", "aggregate-2")


class Step(msgspec.Struct, frozen=True):
    """One step: its time in seconds after the start, the name of a method of `Simulation`, and its arguments."""

    at_s: float
    what: str
    arguments: tuple[object, ...] = ()

    def __str__(self) -> str:
        return f"{self.at_s:8.1f} s  {self.what}({', '.join(map(repr, self.arguments))})"


def steps_of(seed: int, *, span_max_s: float = math.inf) -> list[Step]:
    """Make the schedule of a seed. It spans half a minute to four hours."""
    chance = random.Random(seed)
    span_s = min(span_max_s, chance.choices((30.0, 120.0, 600.0, 3_600.0, 14_400.0), (4, 4, 4, 2, 1))[0])
    steps = [Step(1.0, "request", (chance.choice(DATES),)), Step(span_s, "wait")]
    for _ in range(chance.randint(3, 25)):
        what = chance.choices(list(_MAKERS), [weight for weight, _ in _MAKERS.values()])[0]
        _, arguments_of = _MAKERS[what]
        at_s = round(chance.uniform(0, span_s), 1)
        steps.append(Step(at_s, what, arguments_of(chance)))
        if what == "put_file" and chance.random() < 0.5:
            steps += _read_while_it_changes(chance, at_s, steps[-1])
        if what in {"upstream_down", "upstream_fails"} and chance.random() < 0.5:
            steps += _request_in_an_outage(chance, at_s)
        if what == "append_undecodable":  # other partitions have records meanwhile
            steps += [Step(round(at_s + chance.uniform(0, 60), 1), "request", (date,)) for date in DATES]
    if span_max_s == math.inf and chance.random() < SUSPENDED_SHARE:
        steps += _change_while_suspended(chance, span_s)
    if chance.random() < FAR_SHARE:
        steps.append(Step(0.0, "store_far", (chance.choice((0.2, 1.0)),)))
    return sorted(steps, key=lambda step: step.at_s)


def _change_while_suspended(chance: random.Random, span_s: float) -> list[Step]:
    """Suspend a host when all faults have ended and gc has run. Correct files meanwhile, and run gc again."""
    date, host = chance.choice(DATES), chance.choice(("reader", "reader", "reader", "aggregate-1"))
    collected_s = span_s + FAULT_S_MAX + 60 + GC_AGE_S
    begins_s, lasts_s = collected_s + 240, round(chance.uniform(1_200, 3_600), 1)
    corrections = [(city, date, chance.choice(GOOD_FILES)) for city in chance.sample(CITIES, 2)]
    return [
        Step(collected_s, "gc"),
        Step(collected_s + 60, "request", (date,)),
        Step(begins_s, "suspend", (host, lasts_s)),
        *(Step(begins_s + 10, "put_file", correction) for correction in corrections),
        Step(begins_s + 20, "request", (date,)),
        Step(begins_s + 120 + GC_AGE_S, "gc"),
    ]


def _read_while_it_changes(chance: random.Random, at_s: float, corrected: Step) -> list[Step]:
    """Request a corrected file at once. Perhaps pause a worker meanwhile, and take the correction back."""
    city, date, _ = corrected.arguments
    assert isinstance(city, int)

    def within(seconds: float) -> float:
        return round(at_s + chance.uniform(0, seconds), 1)

    steps = [Step(within(5), "request", (date,))]
    if chance.random() < 0.5:
        worker = chance.choice(("worker-1", "worker-2"))
        steps.append(Step(within(8), "pause", (worker, round(chance.uniform(30, 110), 1))))
        steps.append(Step(within(10), "put_file", (city, date, first_file(city))))
        steps.append(Step(within(60), "request", (date,)))
    return steps


def _request_in_an_outage(chance: random.Random, at_s: float) -> list[Step]:
    """Request dates while the upstream is down, and read stored files again."""
    steps = [Step(round(at_s + chance.uniform(0, 20), 1), "request", (date,)) for date in DATES]
    return [*steps, Step(round(at_s + chance.uniform(0, 60), 1), "backfill", ("bucket",))]


def first_file(city: int) -> tuple[Trip, ...]:
    """Return the file that the upstream has for a city at first."""
    return GOOD_FILES[city % len(GOOD_FILES)]


def _file(chance: random.Random) -> File:
    return chance.choices([*GOOD_FILES, BROKEN_FILE, None], [4, 4, 4, 4, 1, 1])[0]


def _short_or_long(chance: random.Random) -> float:
    return round(chance.choice((chance.uniform(1, 30), chance.uniform(30, FAULT_S_MAX))), 1)


_MAKERS: dict[str, tuple[int, Callable[[random.Random], tuple[object, ...]]]] = {
    "request": (10, lambda chance: (chance.choice(DATES),)),
    "put_file": (10, lambda chance: (chance.choice(CITIES), chance.choice(DATES), _file(chance))),
    "list_city": (3, lambda chance: (chance.choice(CITIES), chance.choice((*COUNTRIES, None)))),
    "break_list": (1, lambda chance: (_short_or_long(chance),)),
    "cancel_request": (1, lambda _: ()),
    "retry_request": (1, lambda _: ()),
    "backfill": (2, lambda chance: (chance.choice(("upstream", "bucket")),)),
    "cancel_backfill": (1, lambda _: ()),
    "schedule": (1, lambda _: ()),
    "rebuild": (1, lambda _: ()),
    "store_down": (2, lambda chance: (_short_or_long(chance),)),
    "kafka_down": (2, lambda chance: (_short_or_long(chance),)),
    "upstream_down": (2, lambda chance: (_short_or_long(chance),)),
    "upstream_fails": (2, lambda chance: (_short_or_long(chance),)),
    "upstream_trickles": (1, lambda chance: (_short_or_long(chance),)),
    "unlucky": (4, lambda chance: (_short_or_long(chance), chance.choice((0.02, 0.1, 0.3)))),
    "store_slow": (3, lambda chance: (round(chance.uniform(30, 1_200), 1), chance.choice((0.3, 3.0, 10.0)))),
    "slow": (2, lambda chance: (_short_or_long(chance), chance.choice((10.0, 100.0, 1_000.0)))),
    "kill": (5, lambda chance: (chance.choice(PROCESSES), round(chance.uniform(0, 60), 1))),
    "stop": (3, lambda chance: (chance.choice(PROCESSES), round(chance.uniform(0, 300), 1))),
    "pause": (6, lambda chance: (chance.choice(PROCESSES), _short_or_long(chance))),
    "cut_off": (2, lambda chance: (chance.choice(PROCESSES), _short_or_long(chance))),
    "redeliver": (2, lambda chance: (chance.randint(1, 10),)),
    "compact": (1, lambda _: ()),
    "append_undecodable": (2, lambda chance: (chance.choice(list(GROUPS)).value, round(chance.uniform(0, 300), 1))),
}
"""Each kind of step: its weight, and what makes its arguments."""
