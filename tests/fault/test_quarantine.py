"""Refused files, and files that crash the worker: their bytes are kept, and nothing else is harmed."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from msgspec import UNSET

from services.ingest.worker.attempts import AttemptNote, Attempts
from services.ingest.worker.isolation import CRASHES_MAX
from shared.domain import keys, objects
from shared.domain.events import Outcome
from shared.domain.ids import CityId
from shared.domain.objects import ReportedRecord
from shared.domain.requests import Status, status_of
from shared.domain.topics import Topic
from shared.runtime.retry import Stopping
from tests.fakes.builders import UpstreamState, trip_file
from tests.fakes.faults import Break, PortCall, PortCalls
from tests.fakes.handling import handle_all
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


def is_noted(world: World) -> bool:
    """Return whether there is a note of an attempt at the first city."""
    return keys.attempt(DATE, CITY) in world.store.objects


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
    """Crashes processes this many times as soon as they read from the first city's file."""

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
    """Return a world whose processes crash this many times while they read the first city's file."""
    world = World()
    world.port_calls = DeadlyReads(times)
    return world


async def test_a_file_that_crashes_processes_is_quarantined_and_can_be_retried() -> None:
    """It crashes one worker, then three processes of its own; then it is quarantined whole until a retry."""
    world = deadly_world(1 + CRASHES_MAX)
    before = quarantined("parser_crash")
    request_id = world.request(WHOLE)
    await world.run_to_rest()
    (report,) = reports(world)
    assert (world.deaths, world.isolated_deaths) == (1, CRASHES_MAX)
    assert world.store.objects[report.key].body == trip_file(MORNING, DATE)
    failure = record_of(world, request_id).failures[0]
    assert (failure.reason, failure.quarantine_key) == (report.reason, report.key)
    assert f"{CRASHES_MAX} processes crashed, one after the other" in failure.reason
    assert quarantined("parser_crash") == before + 1
    assert not is_noted(world)
    world.clock.advance(60)
    await world.retry_quarantined()
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED


@pytest.mark.parametrize("times", [1, 2, CRASHES_MAX])
async def test_a_good_file_is_processed_after_unrelated_crashes(times: int) -> None:
    """If processes crashed on it for other reasons, a good file is processed, and its crashes are forgotten."""
    world = deadly_world(times)
    request_id = world.request(WHOLE)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert (reports(world), is_noted(world), world.deaths) == ([], False, 1)
    assert differences(world) == []


async def test_a_note_of_a_living_process_counts_as_no_crash() -> None:
    """However many attempts another process has noted, or an unreadable note: the file is processed, in isolation."""
    world = World()
    for body in (b"{", objects.encode(AttemptNote(process="another", begun_at=world.clock()))):
        world.store.write(keys.attempt(DATE, CITY), body)
        request_id = world.request(WHOLE if body == b"{" else holding(trip_file(EVENING, DATE)))
        await world.run_to_rest()
        assert status_of(record_of(world, request_id)) is Status.COMPLETED
        assert not is_noted(world)
    assert (reports(world), world.isolated_deaths) == ([], 0)


async def test_a_note_that_cannot_be_removed_is_removed_later_by_the_same_process() -> None:
    """While S3 refuses to delete it, the task waits; no other process is needed for the file."""
    world = World()
    request_id = world.request(WHOLE)
    refused = RefusedDeletes(20)
    world.port_calls = refused
    await world.run_to_rest()
    assert (refused.left, is_noted(world)) == (0, False)
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert not any("isolated" in one.life for one in refused.made)


class RefusedDeletes(PortCalls):
    """Refuses the next calls that delete."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def next_break(self, port_call: PortCall) -> Break | None:
        super().next_break(port_call)
        if port_call.what.startswith("delete") and self.left > 0:
            self.left -= 1
            return Break.REFUSED
        return None


async def test_a_restart_removes_the_note_of_an_attempt() -> None:
    """An attempt that ends because the worker is stopped, or the upstream fails, leaves no note."""
    world = World()
    world.upstream.cuts = {"1": [150, 150, 150]}
    world.request(WHOLE)
    for _ in range(3):
        process = await stopped_in_the_middle(world)
        assert not is_noted(world)
        assert process.retrier.stopping.is_set()
        world.replace("worker")
    await world.run_to_rest()
    assert (reports(world), is_noted(world)) == ([], False)
    assert differences(world) == []


async def stopped_in_the_middle(world: World) -> Process:
    """Ask a worker to stop while it reads the first city's file; return it once it has stopped."""
    while not world.log.take("worker", ROLES["worker"].topic, 1):
        await world.turn("planner")
    process = Process(world, "worker", 0)
    batch = world.log.take("worker", ROLES["worker"].topic, ROLES["worker"].batch_records_max)
    handling = asyncio.ensure_future(handle_all(process.process, batch))
    async with asyncio.timeout(10):
        while not is_noted(world):  # noqa: ASYNC110  # a write to the store has no event
            await asyncio.sleep(0)
    process.retrier.stopping.set()
    with pytest.raises(Stopping):
        await handling
    return process


async def test_a_process_knows_its_own_note() -> None:
    """A process whose attempt is repeated finds its own note, and removes it; it leaves the note of another."""
    world = World()
    own, other = (Attempts(world.store, clock=world.clock) for _ in range(2))
    assert [await own.begin(DATE, CITY) for _ in range(2)] == [True, True]
    assert not await other.begin(DATE, CITY)
    await other.end(DATE, CITY)
    assert is_noted(world)
    await own.end(DATE, CITY)
    assert not is_noted(world)
    assert await other.begin(DATE, CITY)
