"""Refused files, and files that crash the worker: their bytes are kept, and nothing else is harmed."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from msgspec import UNSET

from services.ingest.worker.attempts import ALONE_AFTER, ALONE_CRASHES_MAX, NOTED_MAX, Attempts, CrashedAttempts
from shared.domain import keys, objects
from shared.domain.events import Outcome
from shared.domain.ids import CityId
from shared.domain.objects import AttemptsUnderWay, ReportedRecord
from shared.domain.requests import Status, status_of
from shared.domain.topics import Topic
from shared.runtime.retry import Stopping
from tests.fakes.builders import UpstreamState, trip_file
from tests.fakes.faults import Break, PortCall, PortCalls
from tests.fakes.log import PARTITIONS
from tests.fakes.metrics import REGISTRY
from tests.fault.checks import differences, manifests, record_of, reports
from tests.fault.scenarios import CORRECTED, EMPTY, EVENING, HOME, MORNING, WHOLE
from tests.fault.world import DATE, ROLES, Process, World

BAD_TRIP = b'{"departure-time":"2024-05-01T10:00:00","bus-type":"B","passengers":-1,"delay":"PT0S","accident":false}'
GOOD_TRIP = BAD_TRIP.replace(b"-1", b"1")
BAD = b"[" + GOOD_TRIP + b", " + BAD_TRIP + b"]"
BROKEN = b"[" + GOOD_TRIP + b", NaN, " + b", ".join([GOOD_TRIP] * 6_000) + b"]"
CITY = CityId("1")


def holding(body: bytes) -> UpstreamState:
    """Return an upstream whose first city has this file."""
    return UpstreamState(cities=HOME, files={1: body, 2: EMPTY, 3: EVENING})


def note(world: World) -> AttemptsUnderWay | None:
    """Return the note of attempts at the first city, if there is one."""
    key = keys.attempts(DATE, CITY)
    stored = world.store.objects.get(key)
    return objects.decode(AttemptsUnderWay, stored.body, key) if stored else None


def quarantined(why: str) -> float:
    """Return how many files were refused."""
    return REGISTRY.get_sample_value("tripfold_quarantined_files_total", {"why": why}) or 0.0


def tasks_finished() -> dict[Outcome, float]:
    """Return how many city-days were finished, by outcome."""
    return {
        outcome: REGISTRY.get_sample_value("tripfold_city_tasks_finished_total", {"outcome": outcome.value}) or 0.0
        for outcome in Outcome
    }


async def test_a_refused_file_is_kept_and_the_good_revision_stays() -> None:
    """The bytes and a report are in quarantine, the request says why and where, and the manifest is unchanged."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    stored = manifests(world)
    before = quarantined("invalid")
    request_id = world.request(holding(BAD))
    await world.run_to_rest()
    (report,) = reports(world)
    assert world.store.objects[report.key].body == BAD
    assert (report.city_id, report.country, report.request_id) == ("1", "armenia", request_id)
    assert (report.bad_records, report.records, report.byte_offset) == (1, 2, BAD.index(BAD_TRIP))
    assert report.reported == (
        ReportedRecord(
            record_number=2,
            byte_offset=BAD.index(BAD_TRIP),
            field="passengers",
            value="-1",
            reason=report.reported[0].reason,
        ),
    )
    failure = record_of(world, request_id).failures[0]
    assert (failure.quarantine_key, failure.reason) == (report.key, report.reason)
    assert "record 2" in failure.reason
    assert [msgspec.structs.replace(one, write_intent=UNSET) for one in manifests(world)] == stored
    assert quarantined("invalid") == before + 1
    assert differences(world) == []


async def test_a_retry_that_finds_the_same_bytes_renews_their_report() -> None:
    """A retry is a refusal of the same request: the file is kept for its time from then on, and counts once."""
    world = World()
    request_id = world.request(holding(BAD))
    await world.run_to_rest()
    (first,) = reports(world)
    world.retry(request_id, holding(BAD))
    await world.run_to_rest()
    (renewed,) = reports(world)
    assert (renewed.last_seen_at > first.last_seen_at, renewed.seen) == (True, 1)


async def test_city_days_are_counted_by_outcome() -> None:
    """Each finished city-day counts once, by its outcome."""
    world = World()
    before = tasks_finished()
    world.request(WHOLE)
    await world.run_to_rest()
    world.request(holding(BAD))
    await world.run_to_rest()
    counted = {outcome: count - before[outcome] for outcome, count in tasks_finished().items()}
    assert counted == {Outcome.STORED: 3, Outcome.FAILED: 1, Outcome.UNCHANGED: 2, Outcome.SKIPPED: 0}


async def test_a_corrected_file_is_processed_by_a_retry() -> None:
    """Once the upstream has corrected it, a retry of the request processes the file and completes the request."""
    world = World()
    request_id = world.request(holding(BAD))
    await world.run_to_rest()
    world.retry(request_id, UpstreamState(cities=HOME, files={1: CORRECTED, 2: EMPTY, 3: EVENING}))
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert differences(world) == []


async def test_a_bad_file_is_kept_whole_however_early_its_fault_is_known() -> None:
    """A file that stops being JSON in its second record is received to its end and kept whole."""
    world = World(chunk_bytes=64 * 1024)
    world.request(holding(BROKEN))
    await world.run_to_rest()
    (report,) = reports(world)
    assert world.store.objects[report.key].body == BROKEN
    assert (report.broke_off, report.bad_records) == (None, 0)
    assert differences(world) == []


async def test_a_bad_file_that_breaks_off_is_kept_up_to_the_break() -> None:
    """The received bytes of a file known to be bad are kept, and the report says that they are incomplete."""
    world = World(chunk_bytes=64 * 1024)
    world.upstream.cuts = {"1": [555_555]}
    world.request(holding(BROKEN))
    await world.run_to_rest()
    (report,) = reports(world)
    assert world.store.objects[report.key].body == BROKEN[:555_555]
    assert report.broke_off is not None
    assert "broke off after 555555 bytes" in report.broke_off
    assert differences(world) == []


async def test_a_good_file_that_breaks_off_is_not_taken_for_a_bad_one() -> None:
    """A cut file has no end to its array, which proves nothing about it: it is fetched again."""
    world = World()
    world.upstream.cuts = {"1": [0, 150]}
    request_id = world.request(WHOLE)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert reports(world) == []


async def test_the_same_bad_file_is_kept_once() -> None:
    """However often the same bytes are refused, they are kept once, and their report counts them."""
    world = World()
    requests = []
    for _ in range(3):
        requests.append(world.request(holding(BAD)))
        await world.run_to_rest()
    (report,) = reports(world)
    assert (report.seen, report.request_id, report.last_request_id) == (3, requests[0], requests[2])
    assert {record_of(world, one).failures[0].quarantine_key for one in requests} == {report.key}
    world.request(holding(BAD + b" "))
    await world.run_to_rest()
    assert len(reports(world)) == 2
    assert differences(world) == []


async def test_a_repeated_task_does_not_count_its_file_again() -> None:
    """A worker that crashes after it noted that the same bytes were seen counts them once for its request."""
    world = World()
    for _ in range(2):
        world.request(holding(BAD))
        await world.run_to_rest()
    for partition in range(PARTITIONS):
        world.log.rewind("worker", Topic.CITY_TASKS, partition, len(HOME))
    world.replace("worker")
    await world.run_to_rest()
    (report,) = reports(world)
    assert report.seen == 2


async def test_the_bytes_are_kept_anew_if_their_report_is_deleted_meanwhile() -> None:
    """If gc deletes the report before the new sighting is noted in it, the newer file is kept instead."""
    world = World()
    world.request(holding(BAD))
    await world.run_to_rest()
    (first,) = reports(world)
    compare_and_swap = world.store.compare_and_swap

    async def deleted(key: str, body: bytes, *, etag: str | None) -> str:
        if key == first.report_key:
            world.store.compare_and_swap = compare_and_swap  # type: ignore[method-assign]  # once
            del world.store.objects[key], world.store.objects[first.key]
        return await compare_and_swap(key, body, etag=etag)

    world.store.compare_and_swap = deleted  # type: ignore[method-assign]  # gc comes first
    request_id = world.request(holding(BAD))
    await world.run_to_rest()
    (report,) = reports(world)
    assert (report.attempt != first.attempt, record_of(world, request_id).failures[0].quarantine_key) == (
        True,
        report.key,
    )
    assert world.store.objects[report.key].body == BAD


async def test_the_latest_of_many_reports_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is refused repeatedly is recognised by its latest report, however many lie before it."""
    monkeypatch.setattr("services.ingest.worker.quarantine.REPORTS_COMPARED_MAX", 1)
    world = World()
    for body in (BAD, BAD + b" ", BAD + b" "):
        world.clock.advance(60)
        world.request(holding(body))
        await world.run_to_rest()
    assert sorted(report.seen for report in reports(world)) == [1, 2]


class DeadlyReads(PortCalls):
    """Crashes the worker this many times as soon as it reads from the first city's file."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def next_break(self, port_call: PortCall) -> Break | None:
        super().next_break(port_call)
        if port_call.what == "read file 1" and self.left > 0:
            self.left -= 1
            return Break.DIE_BEFORE
        return None


def deadly_world(times: int) -> World:
    """Return a world whose worker crashes this many times while it reads the first city's file."""
    world = World()
    world.port_calls = DeadlyReads(times)
    return world


async def test_a_file_that_crashes_the_worker_repeatedly_is_quarantined_and_can_be_retried() -> None:
    """After three crashes while parsing it alone, the worker quarantines the file whole until a retry."""
    deaths = ALONE_AFTER + ALONE_CRASHES_MAX
    world = deadly_world(deaths)
    before = quarantined("parser_crash")
    request_id = world.request(WHOLE)
    await world.run_to_rest()
    (report,) = reports(world)
    assert world.deaths == deaths
    assert world.store.objects[report.key].body == trip_file(MORNING, DATE)
    failure = record_of(world, request_id).failures[0]
    assert (failure.reason, failure.quarantine_key) == (report.reason, report.key)
    assert f"{deaths} workers crashed" in failure.reason
    assert f"{ALONE_CRASHES_MAX} of them parsed it alone" in failure.reason
    assert quarantined("parser_crash") == before + 1
    assert note(world) is None
    world.clock.advance(60)
    await world.retry_quarantined()
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED


@pytest.mark.parametrize("times", [1, ALONE_AFTER, ALONE_AFTER + ALONE_CRASHES_MAX - 1])
async def test_a_good_file_is_processed_after_unrelated_crashes(times: int) -> None:
    """If workers crashed on it for other reasons, a good file is processed, and its crashes are forgotten."""
    world = deadly_world(times)
    request_id = world.request(WHOLE)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert (reports(world), note(world)) == ([], None)
    assert differences(world) == []


async def test_restarts_and_upstream_faults_do_not_count_as_crashes() -> None:
    """An attempt that ends because the worker is stopped, or the upstream fails, removes itself from the note."""
    world = World()
    world.upstream.cuts = {"1": [150, 150, 150]}
    world.request(WHOLE)
    for _ in range(3):
        process = await stopped_in_the_middle(world)
        assert note(world) is None
        assert process.retrier.stopping.is_set()
        world.replace("worker")
    await world.run_to_rest()
    assert (reports(world), note(world)) == ([], None)
    assert differences(world) == []


async def test_a_broken_download_removes_no_earlier_crash() -> None:
    """An attempt that ends with an upstream fault removes no other: earlier crashes stay in the note."""
    world = deadly_world(1)
    world.upstream.cuts = {"1": [150] * 20}
    world.request(WHOLE)
    await world.run_to_rest()
    left = note(world)
    assert left is not None
    assert len(left.under_way) == 1


async def test_an_attempt_is_removed_although_another_is_noted_at_the_same_time() -> None:
    """If another attempt is noted meanwhile, both changes of the note are kept."""
    world = World()
    attempts = Attempts(world.store, clock=world.clock)
    for attempt in ("one", "two"):
        await attempts.begin(DATE, CITY, attempt, alone=False)
    compare_and_swap = world.store.compare_and_swap

    async def overtaken(key: str, body: bytes, *, etag: str | None) -> str:
        world.store.compare_and_swap = compare_and_swap  # type: ignore[method-assign]  # once
        await attempts.begin(DATE, CITY, "three", alone=False)
        return await compare_and_swap(key, body, etag=etag)

    world.store.compare_and_swap = overtaken  # type: ignore[method-assign]  # another worker comes first
    await attempts.end(DATE, CITY, "one", settled=False)
    left = note(world)
    assert left is not None
    assert [one.attempt for one in left.under_way] == ["two", "three"]


async def stopped_in_the_middle(world: World) -> Process:
    """Ask a worker to stop while it reads the first city's file; return it once it has stopped."""
    while not world.log.take("worker", ROLES["worker"].topic, 1):
        await world.turn("planner")
    process = Process(world, "worker", 0)
    batch = world.log.take("worker", ROLES["worker"].topic, ROLES["worker"].batch_records_max)
    handling = asyncio.ensure_future(process.process(batch))
    async with asyncio.timeout(10):
        while note(world) is None:  # noqa: ASYNC110  # a write to the store has no event
            await asyncio.sleep(0)
    process.retrier.stopping.set()
    with pytest.raises(Stopping):
        await handling
    return process


async def test_a_note_holds_a_bounded_number_of_attempts() -> None:
    """However many attempts are noted, the note stays small, and an attempt counts only the others."""
    world = World()
    attempts = Attempts(world.store, clock=world.clock)
    counts = [await attempts.begin(DATE, CITY, str(number), alone=number > 1) for number in range(NOTED_MAX + 5)]
    assert counts[:3] == [CrashedAttempts(all=number, alone=0) for number in range(3)]
    assert counts[-1] == CrashedAttempts(all=NOTED_MAX, alone=NOTED_MAX)
    left = note(world)
    assert left is not None
    assert len(left.under_way) == NOTED_MAX
    await attempts.end(DATE, CITY, left.under_way[0].attempt, settled=False)
    left = note(world)
    assert left is not None
    assert len(left.under_way) == NOTED_MAX - 1
    await attempts.end(DATE, CITY, "another", settled=True)
    assert note(world) is None
    await attempts.end(DATE, CITY, "another", settled=False)
