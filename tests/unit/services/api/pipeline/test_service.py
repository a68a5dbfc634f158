"""The report on the pipeline: lag, rates and what the latest requests achieved."""

from __future__ import annotations

import asyncio
import datetime as dt

import msgspec

from services.api.health import Readiness
from services.api.pipeline.service import RATE_WINDOW_S, RECENT_REQUESTS_MAX, REPORT_AGE_MAX_S, SERVICES, Pipeline
from shared.domain.events import Outcome
from shared.domain.topics import GROUPS, Topic
from shared.kafka.group_offsets import GroupOffsets
from shared.runtime.health import Health
from tests.fakes.api import NOW, World, record_of, write


class Seconds:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pipeline(world: World, seconds: Seconds) -> Pipeline:
    """Return the pipeline of a world."""
    health = Health()
    health.started = True
    return Pipeline(world.store, Readiness(health, {}), world.read_offsets, clock=world.clock, clock_s=seconds)


def offsets(*, lag: int, committed: int, members: int | None = 1) -> list[GroupOffsets]:
    """Return what Kafka says of the worker's group."""
    return [GroupOffsets(topic=Topic.CITY_TASKS, lag=lag, committed=committed, members=members)]


async def test_a_stage_says_what_it_has_left_and_how_fast_it_is() -> None:
    """The first report has no rate; a later one has the records committed since, by the time between."""
    world, seconds = World(), Seconds()
    reporter = pipeline(world, seconds)
    world.offsets = offsets(lag=40, committed=100)
    (stage,) = (await reporter.report()).stages or ()
    assert (stage.service, stage.topic, stage.state, stage.consumers) == ("worker", "city-tasks", "working", 1)
    assert (stage.lag, stage.records_per_second) == (40, None)
    seconds.now_s += RATE_WINDOW_S
    world.offsets = offsets(lag=0, committed=140, members=0)
    (stage,) = (await reporter.report()).stages or ()
    assert (stage.state, stage.lag, stage.records_per_second) == ("stopped", 0, 4.0)
    seconds.now_s += RATE_WINDOW_S
    world.offsets = offsets(lag=0, committed=140, members=None)
    (stage,) = (await reporter.report()).stages or ()
    assert (stage.state, stage.consumers, stage.records_per_second) == ("idle", None, 0.0)


async def test_a_report_is_shared_for_a_moment() -> None:
    """Within REPORT_AGE_MAX_S all clients get the same report."""
    world, seconds = World(), Seconds()
    reporter = pipeline(world, seconds)
    first = await reporter.report()
    world.offsets = offsets(lag=1, committed=1)
    assert await reporter.report() is first
    seconds.now_s += REPORT_AGE_MAX_S
    assert await reporter.report() is not first


async def test_clients_that_wait_for_a_slow_report_share_it() -> None:
    """A report that took longer to make than it is kept is made once for all clients that waited."""
    world, seconds = World(), Seconds()
    made = 0

    async def slow() -> list[GroupOffsets]:
        nonlocal made
        made += 1
        await asyncio.sleep(0)
        seconds.now_s += 2 * REPORT_AGE_MAX_S
        return []

    health = Health()
    health.started = True
    reporter = Pipeline(world.store, Readiness(health, {}), slow, clock=world.clock, clock_s=seconds)
    reports = await asyncio.gather(*(reporter.report() for _ in range(3)))
    assert made == 1
    assert all(one is reports[0] for one in reports)


async def test_an_outage_leaves_the_other_part() -> None:
    """Without Kafka there are no stages, without S3 no throughput; the faults say why."""
    world, seconds = World(), Seconds()
    world.publisher.down = True
    report = await pipeline(world, seconds).report()
    assert (report.stages, report.faults["kafka"]) == (None, "Kafka at broker.internal:9092 cannot be reached")
    assert report.throughput is not None
    world.publisher.down, world.store.down = False, True
    report = await pipeline(world, seconds).report()
    assert (report.stages, report.throughput) == ((), None)
    assert report.faults["s3"] == "S3 at storage.internal:9000 is down"


async def test_the_throughput_counts_what_made_progress_in_the_last_hour() -> None:
    """It sums the cities, trips and bytes of recent requests, at most RECENT_REQUESTS_MAX, and not of older ones."""
    world = World()
    record = msgspec.structs.replace(
        record_of(NOW),
        planned=True,
        cities=1,
        outcomes={Outcome.STORED: "1"},
        served="1",
        trips_done=7,
        bytes_done=1_000,
    )
    write(world, record)
    write(world, record_of(NOW + dt.timedelta(minutes=1)))
    throughput = (await pipeline(world, Seconds()).report()).throughput
    assert throughput is not None
    assert msgspec.structs.astuple(throughput) == (1, 1, 1, 7, 1_000)
    for number in range(RECENT_REQUESTS_MAX):
        write(world, record_of(NOW + dt.timedelta(minutes=2, milliseconds=number)))
    throughput = (await pipeline(world, Seconds()).report()).throughput
    assert throughput is not None
    assert (throughput.requests_open, throughput.trips_done) == (RECENT_REQUESTS_MAX, 0)
    world.clock.now = NOW + dt.timedelta(hours=2)
    throughput = (await pipeline(world, Seconds()).report()).throughput
    assert throughput is not None
    assert throughput.requests_open == 0


def test_every_consumer_group_belongs_to_a_service() -> None:
    """Each group that a service has is shown with its service."""
    assert SERVICES.keys() == GROUPS.keys()
