"""Tasks and requests that are tried again later: how often, how late, how long in an outage, and by which topic."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from services.ingest.retries import Retries, next_attempt
from services.ingest.upstream.errors import (
    OutageTooLong,
    PermanentUpstreamError,
    TransientUpstreamError,
    UpstreamDown,
    UpstreamHeld,
)
from services.ingest.upstream.retry import WAIT_MAX_S
from shared.domain import events
from shared.domain.events import BACKGROUND, IngestCity
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.topics import Topic
from shared.kafka.records import OutgoingEvent
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from tests.fakes.builders import Clock
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fault.scenarios import WHOLE
from tests.fault.world import World

NOON = dt.datetime(2024, 5, 2, 12, tzinfo=dt.UTC)
ATTEMPTS_MAX = 3
OUTAGE_LIMIT_S = 900.0
TASK = IngestCity(
    request_id=RequestId("018f38bf-1d00-7000-8000-000000000001"),
    date=dt.date(2024, 5, 1),
    city_id=CityId("1"),
    upstream_id="1",
    city_name="Port Tina",
    country=CountrySlug("armenia"),
    country_name="Armenia",
    plan_revision=1,
    position=0,
)


def again(task: IngestCity, fault: TransientUpstreamError | UpstreamDown, *, after_s: float = 0.0) -> IngestCity:
    """Return a task as it is tried next, after a run that began so long after noon and ended at once."""
    at = NOON + dt.timedelta(seconds=after_s)
    return next_attempt(task, fault, began_at=at, now=at, attempts_max=ATTEMPTS_MAX, outage_limit_s=OUTAGE_LIMIT_S)


def test_attempts_are_counted_from_task_to_task() -> None:
    """Each attempt that broke is counted in the task, and the last one fails the city with its reason."""
    task = TASK
    for number in range(1, ATTEMPTS_MAX):
        task = again(task, TransientUpstreamError("answered 503"))
        assert task.failed_attempts == number
        assert task.not_before is not None
        assert NOON <= task.not_before <= NOON + dt.timedelta(seconds=WAIT_MAX_S)
    with pytest.raises(PermanentUpstreamError, match=r"answered 503 \(3 attempts\)"):
        again(task, TransientUpstreamError("answered 503"))


def test_an_outage_costs_no_attempt_and_is_limited_from_task_to_task() -> None:
    """An upstream that is down is waited for up to the limit, counted since a task first found it down."""
    task = again(again(TASK, TransientUpstreamError("cut")), UpstreamDown("refused"))
    for after_s in (30, 300, 890):
        task = again(task, UpstreamDown("refused"), after_s=after_s)
        assert (task.failed_attempts, task.down_since) == (1, NOON)
    with pytest.raises(PermanentUpstreamError, match=r"refused \(for 900 s\)"):
        again(task, UpstreamDown("refused"), after_s=900)
    with pytest.raises(PermanentUpstreamError, match="for 900 s"):
        again(TASK, OutageTooLong("refused"))
    assert again(task, TransientUpstreamError("cut"), after_s=895).down_since is None


def test_a_wait_that_the_upstream_asked_for_is_no_outage() -> None:
    """A task that comes while the upstream has asked to wait is tried after that time, however long it is."""
    task = again(TASK, UpstreamHeld(2 * OUTAGE_LIMIT_S))
    assert (task.failed_attempts, task.down_since) == (0, None)
    assert task.not_before == NOON + dt.timedelta(seconds=2 * OUTAGE_LIMIT_S)


class Waiting(Retrier):
    """Waits no time, and notes for how long it would have."""

    def __init__(self) -> None:
        super().__init__(health=Health(), wait_max_s=1)
        self.slept_s = 0.0

    def now_s(self) -> float:
        return self.slept_s

    async def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


async def test_tasks_are_published_again_when_they_are_due() -> None:
    """The earliest comes first, whatever the order of the topic; none is waited for longer than the longest wait."""
    log, retrier = MemoryLog(), Waiting()
    publisher = MemoryPublisher(log)
    for city, wait_s in (("late", 20), ("now", -5), ("soon", 2), ("far", 10_000)):
        not_before = NOON + dt.timedelta(seconds=wait_s)
        task = msgspec.structs.replace(TASK, city_id=CityId(city), not_before=not_before)
        await publisher.publish([OutgoingEvent(task, topic=Topic.RETRIES)])
    batch = log.records(Topic.RETRIES)
    await Retries(publisher, clock=Clock(NOON), retrier=retrier).process(batch)
    given_back = [one for one in log.appended if one.topic is Topic.CITY_TASKS]
    cities = [
        event.city_id for one in given_back if isinstance(event := events.decode(one.topic, one.value), IngestCity)
    ]
    assert cities == ["now", "soon", "late", "far"]
    assert retrier.slept_s == WAIT_MAX_S


async def test_a_background_task_stays_in_the_background() -> None:
    """A task of a backfill is not tried again before the tasks of clients."""
    log = MemoryLog()
    publisher = MemoryPublisher(log)
    task = msgspec.structs.replace(TASK, background=BACKGROUND)
    await publisher.publish([OutgoingEvent(task, topic=Topic.RETRIES)])
    batch = log.records(Topic.RETRIES)
    await Retries(publisher, clock=Clock(NOON), retrier=Waiting()).process(batch)
    assert (len(log.records(Topic.BACKGROUND_TASKS)), log.records(Topic.CITY_TASKS)) == (1, [])


async def test_a_broken_download_does_not_delay_its_batch() -> None:
    """The worker commits a batch whose city broke off: the city waits in a topic of its own, and comes again."""
    world = World()
    world.upstream.cuts = {"1": [0, 0]}
    request_id = world.request(WHOLE)
    while await world.turn("planner") or await world.turn("worker"):
        pass
    (waiting,) = world.log.records(Topic.RETRIES)
    assert waiting.key == b"2024-05-01/1"
    assert len(world.store.bodies("manifests/")) == 2
    await world.run_to_rest()
    assert len(world.store.bodies("manifests/")) == 3
    assert world.oracle.statuses[request_id] == "completed"
