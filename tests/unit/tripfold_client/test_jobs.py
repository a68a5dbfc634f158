"""Following and changing requests and backfills: over the API, and over a server that fails."""

from __future__ import annotations

import asyncio
import datetime as dt

import msgspec
import pytest
from tripfold_client import (
    AsyncTripfold,
    Conflict,
    NotFound,
    Request,
    Tripfold,
    UnreadableObject,
    UnreadableWarning,
    WaitTimeout,
)

from shared.domain import keys
from shared.domain.events import Outcome
from shared.domain.ids import CityId
from shared.domain.objects import Failure, RequestRecord
from tests.fakes.api import DAY, NOW, World, record_of, write
from tests.fakes.api import REQUEST as REQUEST_ID
from tests.fakes.scripted_server import HANG_UP, event_stream, response, scripted_server
from tests.serving import served
from tests.unit.tripfold_client import REQUEST

ENDED = REQUEST | {"status": "completed", "version": 9}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll and retry without waiting long."""
    monkeypatch.setattr("tripfold_client.jobs.POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr("services.api.requests.event_stream.POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr("tripfold_client.connection.BACKOFF_S", 0.002)


def versions(url: str, *, timeout: float | None = None) -> list[int]:
    """Return the versions of the states that follow the first."""
    return [state.version for state in Tripfold(url).job(REQUEST["id"]).states(timeout=timeout)]


def state(version: int) -> dict[str, object]:
    """Return a running request."""
    return REQUEST | {"status": "running", "version": version}


async def test_each_state_comes_once_until_the_end() -> None:
    """Over the API, each change of a request is seen, and the last has its failures, for asyncio and blocking."""
    world = World()
    record = record_of()
    write(world, record)
    states = [
        msgspec.structs.replace(record, planned=True, cities=2, version=2),
        msgspec.structs.replace(
            record,
            planned=True,
            cities=2,
            version=3,
            outcomes={Outcome.STORED: "1", Outcome.FAILED: "2"},
            served="1",
            failures={1: Failure(city_id=CityId("8"), city_name="Li\u2028ma", reason="404")},
        ),
    ]
    with served(world) as url:
        async with AsyncTripfold(url) as api, asyncio.timeout(20):
            job = await api.job(record.request_id)
            blocking = await asyncio.to_thread(Tripfold(url).job, record.request_id)
            seen = asyncio.create_task(asyncio.to_thread(lambda: [later.version for later in blocking.states()]))
            write(world, states[0])
            async for later in job.states():
                assert later.version in {2, 3}
                write(world, states[1])
            assert (job.status, (await seen)[-1]) == ("completed with failures", 3)
    assert isinstance(job.state, Request)
    assert [failure.city_name for failure in job.state.failures] == ["Li\u2028ma"]


def test_a_cut_stream_continues_where_it_broke() -> None:
    """After a stream broke the state is read, and the next stream begins after it."""
    answers = (
        response(200, REQUEST),
        event_stream(state(2), state(3), cut=True),
        response(200, state(4)),
        event_stream(state(5), ENDED),
    )
    with scripted_server(*answers) as (url, seen):
        assert versions(url) == [2, 3, 4, 5, 9]
        assert [line for head in seen for line in head.splitlines() if "Last-Event-ID" in line] == [
            "Last-Event-ID: 1",
            "Last-Event-ID: 4",
        ]


@pytest.mark.parametrize(
    "refusal", [response(404, b"<html>"), response(200, b"<html>", Content_Type="text/html"), response(501, {})]
)
def test_without_streams_the_state_is_polled(refusal: bytes) -> None:
    """Where a proxy does not let streams pass, the states are read one by one, and a stream is not tried again."""
    polled = (response(200, state(2)), response(200, state(2)), response(200, ENDED))
    with scripted_server(response(200, REQUEST), refusal, *polled) as (url, seen):
        assert versions(url) == [2, 9]
        assert sum("/events" in head for head in seen) == 1


def test_too_many_streams_are_tried_again() -> None:
    """If the API has no stream left, the state is polled once, and a stream is tried again."""
    busy = response(503, {"type": "x", "title": "x", "status": 503, "detail": "x"})
    answers = (response(200, REQUEST), busy, response(200, state(2)), event_stream(ENDED))
    with scripted_server(*answers) as (url, _):
        assert versions(url) == [2, 9]


def test_a_restart_of_the_api_is_outlasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a job is followed, the API may be away for longer than the retries of a call."""
    away = [HANG_UP] * 8
    with scripted_server(response(200, REQUEST), *away, response(200, ENDED)) as (url, _):
        assert versions(url) == [9]
    monkeypatch.setattr("tripfold_client.jobs.OUTAGE_MAX_S", 0.02)
    with (
        scripted_server(response(200, REQUEST), *away) as (url, _),
        pytest.raises(Exception, match="cannot be reached"),
    ):
        versions(url)


def test_waiting_ends_in_time() -> None:
    """After the timeout the error says how far the job is, and that it goes on."""
    answers = [response(200, state(2))] * 1_000
    with scripted_server(*answers) as (url, seen):
        job = Tripfold(url).job(REQUEST["id"])
        with pytest.raises(WaitTimeout, match=r"2024-05-01, running, 0/0 cities after 0\.05 s\. It goes on"):
            job.wait(timeout=0.05)
        assert not any("/events" in head for head in seen)


def test_a_conflict_after_a_lost_response_is_our_own_effect() -> None:
    """If the first attempt of a retry was lost, and the second meets a conflict, the present state is returned."""
    conflict = response(409, {"type": "x", "title": "x", "status": 409, "detail": "It has not ended."})
    with scripted_server(response(200, ENDED), HANG_UP, conflict, response(200, state(10))) as (url, _):
        assert Tripfold(url).retry(REQUEST["id"]).status == "running"
    with scripted_server(response(200, ENDED), conflict) as (url, _), pytest.raises(Conflict, match="has not ended"):
        Tripfold(url).retry(REQUEST["id"])


def test_listings_follow_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests come, newest first, or as many as wanted."""
    monkeypatch.setattr("tripfold_client.jobs.PAGE_MAX", 2)
    world = World()
    records: list[RequestRecord] = [record_of(NOW + dt.timedelta(seconds=second)) for second in range(5)]
    for record in records:
        write(world, record)
    newest_first = [record.request_id for record in reversed(records)]
    with served(world) as url, Tripfold(url) as api:
        for limit in (None, 0, 1, 2, 3, 9):
            assert [one.id for one in api.requests(limit)] == newest_first[:limit]


async def test_listings_report_what_cannot_be_read() -> None:
    """A request, a backfill and a schedule that cannot be read are reported, or there is a warning."""
    world = World()
    damaged = {keys.request(REQUEST_ID), keys.backfill(REQUEST_ID), keys.schedule("daily")}
    for key in damaged:
        world.store.write(key, b"torn")
    with served(world) as url:
        reported: list[UnreadableObject] = []
        with Tripfold(url) as api:
            assert [*api.requests(on_unreadable=reported.append), *api.backfills(on_unreadable=reported.append)] == []
            assert api.schedules(on_unreadable=reported.append) == ()
            with pytest.warns(UnreadableWarning, match="schedules/daily"):
                api.schedules()
        assert {one.key for one in reported} == damaged
        async with AsyncTripfold(url) as for_asyncio:
            with pytest.warns(UnreadableWarning, match=REQUEST_ID):
                assert [one async for one in for_asyncio.requests()] == []


def test_requests_and_backfills_are_found_and_changed_by_their_id() -> None:
    """One method finds, cancels or retries either. An unknown id is NotFound."""
    with served(World()) as url, Tripfold(url) as api:
        request, backfill = api.process(DAY), api.process(DAY, "2024-05-03")
        assert [api.job(one.id).id for one in (request, backfill)] == [request.id, backfill.id]
        assert api.pause(backfill.id).status == "paused"
        assert api.resume(backfill.id).status == "running"
        assert api.cancel(backfill.id).status == backfill.refresh().status == "cancelled"
        assert api.cancel(request.id).id == request.id
        assert [one.id for one in api.backfills()] == [backfill.id]
        with pytest.raises(NotFound):
            api.job("../requests")
