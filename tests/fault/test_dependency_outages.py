"""Poison records, newer events, outages, a full disk, a lost bucket and wrong clocks: no wrong data is written.

The fault model:
- A poison record lies anywhere in any topic.
- A port refuses every call, or every write, for any time.
- The whole bucket is deleted.
- Clocks are wrong by a day.

Processes only wait, report it, and go on without help.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping

import pytest
from msgspec import UNSET

from shared.domain import events, schema
from shared.domain.events import BACKGROUND, ProcessRequested
from shared.domain.ids import RequestId
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from tests.fakes.builders import UpstreamState
from tests.fakes.faults import Break, PortCall, PortCalls
from tests.fault.checks import differences, topics_against_the_bucket
from tests.fault.scenarios import CORRECTED, EMPTY, EVENING, HOME, MOVED, WHOLE
from tests.fault.world import DATE, ROLES, NotAtRest, World

DAY = dt.timedelta(days=1)
CORRECTION = UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING})
LOG_CALLS = ("publish", "commit", "dead letter", "take the end", "read the topic")
UPSTREAM_CALLS = ("GET", "read file")

POISON: dict[str, bytes | None] = {
    "no value": None,
    "nothing": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"type":"\xff"}',
    "null": b"null",
    "a list": b"[]",
    "no type": b'{"date":"2024-05-01"}',
    "a type that is no text": b'{"type":7}',
    "fields missing": b'{"type":"city-day-stats"}',
    "half a surrogate": b'{"type":"ingest-city","date":"\\ud800"}',
    "nested without end": b"[" * 100_000,
    "a number without end": b'{"type":"city-folded","position":' + b"9" * 5_000 + b"}",
    "an event of another topic": b'{"type":"country-day-summary","date":"2024-05-01"}',
}
each_role = pytest.mark.parametrize("role", list(ROLES))


def is_of_store(port_call: PortCall) -> bool:
    """Tell whether a call goes to the bucket."""
    return not port_call.what.startswith((*LOG_CALLS, *UPSTREAM_CALLS))


def is_of_log(port_call: PortCall) -> bool:
    """Tell whether a call goes to the log."""
    return port_call.what.startswith(LOG_CALLS)


def writes_to_store(port_call: PortCall) -> bool:
    """Tell whether a call writes into the bucket, as those that a full disk refuses."""
    return is_of_store(port_call) and (port_call.effect or port_call.what.startswith("write"))


class Outage(PortCalls):
    """Refuses some calls of a port, beginning with a certain call."""

    def __init__(self, refused: Callable[[PortCall], bool], *, begin: int, calls: int) -> None:
        super().__init__()
        self._refused = refused
        self._begin = begin
        self.calls_left = calls

    def next_break(self, port_call: PortCall) -> Break | None:
        self.made.append(port_call)
        if len(self.made) <= self._begin or not self.calls_left or not self._refused(port_call):
            return None
        self.calls_left -= 1
        return Break.REFUSED


def is_dead_letter(port_call: PortCall) -> bool:
    """Tell whether a call publishes a dead letter."""
    return port_call.what.startswith("dead letter")


@each_role
@pytest.mark.parametrize("value", list(POISON.values()), ids=list(POISON))
async def test_poison_in_any_topic_goes_to_dead_letters(role: str, value: bytes | None) -> None:
    """A poison record goes to the dead letters unchanged, and the events around it count."""
    world = World()
    topic = ROLES[role].topic
    keys_ = [f"{DATE}/{number}".encode() for number in range(6)]
    for key in keys_[:3]:
        world.log.append(topic, key, value, [("odd", b"\xff")])
    world.request(WHOLE)
    await world.run_to_rest()
    for key in keys_[3:]:
        world.log.append(topic, key, value, [("odd", b"\xff")])
    await world.run_to_rest()
    letters = world.log.records(Topic.DEAD_LETTERS)
    assert sorted((letter.key, letter.value) for letter in letters) == [(key, value) for key in keys_]
    assert all(letter.headers[0] == ("odd", b"\xff") for letter in letters)
    assert {dict(letter.headers)["tripfold_origin_topic"] for letter in letters} == {topic.value.encode()}
    assert not [one for one in differences(world) if "in the dead letters" not in one]
    assert topics_against_the_bucket(world, dead_letters=6) == []


@each_role
async def test_a_record_without_acknowledged_dead_letter_is_not_committed(role: str) -> None:
    """While a dead letter is not acknowledged, its record is not committed, and later records wait."""
    world = World()
    topic = ROLES[role].topic
    poison = world.log.append(topic, f"{DATE}/x".encode(), b"{")
    world.port_calls = Outage(is_dead_letter, begin=0, calls=100_000)
    with pytest.raises(NotAtRest):
        await world.turn(role)
    assert not world.living(role).health.ready
    assert poison in world.log.take(role, topic, 10)
    world.port_calls = PortCalls()
    world.replace(role)
    world.request(WHOLE)
    await world.run_to_rest()
    assert topics_against_the_bucket(world, dead_letters=1) == []


def of_type(role: str, kind: str, version: int) -> ConsumedRecord:
    """Return a record of the role's topic that is of a type and a schema version."""
    value = f'{{"type":"{kind}","schema_version":{version}}}'.encode()
    return ConsumedRecord(topic=ROLES[role].topic, partition=0, offset=0, key=b"2024-05-01/x", value=value)


@each_role
@pytest.mark.parametrize("known", [True, False], ids=["a known type", "an unknown type"])
async def test_a_newer_event_stops_its_service_alone(role: str, known: bool) -> None:
    """A service with an event of a later version waits, is not ready, and names it; no event is lost."""
    world = World()
    before = dict(world.store.objects)
    kind = events.EVENT_TYPES[ROLES[role].topic][0].__struct_config__.tag
    record = of_type(role, str(kind) if known else "not-known-yet", 2)
    appended = world.log.append(record.topic, record.key, record.value)
    with pytest.raises(NotAtRest):
        await world.turn(role)
    health = world.living(role).health
    assert not health.ready
    place = f"partition {appended.partition}, offset {appended.offset} of {record.topic.value}"
    assert any("upgrade it" in reason and place in reason for reason in health.faults.values())
    assert appended in world.log.take(role, record.topic, 10)
    assert world.log.records(Topic.DEAD_LETTERS) == []
    assert world.store.objects == before


@each_role
async def test_unknown_event_type_goes_to_dead_letters(role: str) -> None:
    """A record of an unknown type goes to the dead letters, and the service goes on."""
    world = World()
    record = of_type(role, "unknown-thing", 1)
    world.log.append(record.topic, record.key, record.value)
    world.request(WHOLE)
    await world.run_to_rest()
    assert [letter.value for letter in world.log.records(Topic.DEAD_LETTERS)] == [record.value]
    assert topics_against_the_bucket(world, dead_letters=1) == []


async def test_after_an_upgrade_the_newer_event_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event that an old version stopped at is handled by the version that knows it, and nothing was skipped."""
    world = World()
    WHOLE.write_into(world.upstream, DATE)
    request_id = RequestId("018f38bf-1d00-7000-8000-000000000001")
    event = ProcessRequested(request_id=request_id, date=DATE, requested_at=world.clock(), schema_version=2)
    world.log.append(event.topic, event.key.encode(), events.encode(event))
    with pytest.raises(NotAtRest):
        await world.run_to_rest()
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    world.replace("planner")
    world.unexpected.clear()
    world.oracle.requested(request_id, WHOLE)
    await world.run_to_rest()
    assert differences(world) == []


@pytest.mark.parametrize("calls", [1, 30, 400])
@pytest.mark.parametrize("refused", [is_of_store, is_of_log, writes_to_store], ids=["S3", "Kafka", "a full disk"])
async def test_an_outage_is_retried_without_dead_letters(refused: Callable[[PortCall], bool], calls: int) -> None:
    """In any outage of any length no failure is reported, and the end is the same as without it."""
    calm = World()
    calm.request(WHOLE)
    await calm.run_to_rest()
    for begin in range(0, len(calm.port_calls.made), 9):
        world = World()
        world.request(WHOLE)
        world.port_calls = outage = Outage(refused, begin=begin, calls=calls)
        await world.run_to_rest()
        outage.calls_left = 0
        world.request(CORRECTION)
        await world.run_to_rest()
        assert differences(world) == [], f"an outage from call {begin} on"
        assert all(world.living(role).health.faults == {} for role in world.roles_living)


@pytest.mark.parametrize("role", [role for role in ROLES if role != "retries"])  # which has no use for S3
async def test_an_outage_makes_a_process_not_ready(role: str) -> None:
    """While S3 refuses every call, a process with work is not ready and names S3."""
    world = World()
    for background in (UNSET, BACKGROUND):
        world.request(WHOLE, background=background)
        await world.run_to_rest()
    for partition in world.log.ends(ROLES[role].topic):
        world.log.rewind(role, ROLES[role].topic, partition, 100)
    world.port_calls = Outage(is_of_store, begin=0, calls=100_000)
    world.replace(role)
    with pytest.raises(NotAtRest):
        await world.turn(role)
    health = world.living(role).health
    health.started = True
    assert not health.ready
    assert any("was refused" in reason for reason in health.faults.values())
    assert world.log.records(Topic.DEAD_LETTERS) == []


async def test_a_deleted_bucket_is_filled_again() -> None:
    """After the bucket was deleted and created again beside the old topics, a request brings everything back.

    No revision is minted twice: revisions of the new bucket begin above all that the old one can have minted. Records
    of city-days that are not requested again stay in the topics. A summary may begin at a lower version than before, if
    its ledger has fewer cities (docs/explanation/limits.md).
    """
    world = World()
    for truth in (WHOLE, CORRECTION):
        world.request(truth)
        await world.run_to_rest()
    world.store.objects.clear()
    world.store.unfinished.clear()
    world.oracle.statuses.clear()
    world.clock.advance(DAY.total_seconds())
    for role in ROLES:
        world.replace(role)
    world.request(CORRECTION)
    await world.run_to_rest()
    stays = ("expected None", " in country-day-summaries: ")
    assert [one for one in differences(world) if not any(part in one for part in stays)] == []


class SkewedWorld(World):
    """Every role has a clock of its own, each wrong by a day."""

    skews: Mapping[str, dt.timedelta] = {
        "planner": DAY,
        "worker": -DAY,
        "aggregate": DAY,
        "progress": -DAY,
        "requeue": DAY,
    }

    def clock_of(self, role: str) -> Callable[[], dt.datetime]:
        return lambda: self.clock() + self.skews[role]


class OtherwiseSkewedWorld(SkewedWorld):
    """The same, the other way round."""

    skews: Mapping[str, dt.timedelta] = {role: -skew for role, skew in SkewedWorld.skews.items()}


@pytest.mark.parametrize("kind", [SkewedWorld, OtherwiseSkewedWorld])
async def test_clocks_may_be_wrong_by_a_day(kind: type[World]) -> None:
    """Served numbers, the highest revisions and the ends of requests depend on no clock."""
    world = kind()
    for truth in (UpstreamState(cities=HOME, files={1: CORRECTED}), WHOLE, CORRECTION, WHOLE):
        world.request(truth)
        for _ in range(2):
            await world.turn("planner")
            await world.requeue()
        await world.run_to_rest()
        assert (await world.gc()).ended_well
    assert differences(world) == []
