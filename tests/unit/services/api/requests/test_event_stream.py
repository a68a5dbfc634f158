"""Event streams, and responses that wait for the end of a request."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import msgspec
import pytest

from services.api.auth import digest_of, mint_key
from services.api.requests import event_stream as event_stream_module
from services.api.requests.event_stream import EventStream, StreamPlaces, event_of, request_stream
from services.api.requests.service import Requests, detail_of
from shared.domain import keys
from shared.domain.events import Outcome
from shared.domain.objects import RequestRecord
from tests.fakes.api import DAY, NOW, World, record_of, write
from tests.serving import served


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream_module, "POLL_INTERVAL_S", 0.001)


def stream_of(world: World) -> EventStream[RequestRecord]:
    """Return the event streams of a world's requests."""
    return request_stream(Requests(world.store, world.publisher, clock=world.clock), StreamPlaces())


def running(version: int) -> RequestRecord:
    """Return a request that has two cities, and nothing done."""
    return msgspec.structs.replace(record_of(NOW), request_id=ID, version=version, planned=True, cities=2)


def completed(version: int) -> RequestRecord:
    """Return the same request with all done."""
    return msgspec.structs.replace(running(version), outcomes={Outcome.STORED: "3"}, served="3")


def shown(record: RequestRecord) -> bytes:
    """Return the event that shows a request."""
    return event_of(record.version, detail_of(record))


HEARTBEAT = b": still there\n\n"
ID = record_of(NOW).request_id
EVENTS = f"/process-requests/{ID}/events"
WAIT_MAX_S = 15


async def begun(
    streams: EventStream[RequestRecord], record: RequestRecord, last_seen: str = ""
) -> AsyncIterator[bytes]:
    """Return the events from a record on."""
    events = await streams.events(record, last_seen, caller="Client")
    assert events is not None
    return events


async def test_stream_has_each_change_and_ends_with_the_request(world: World) -> None:
    """Each change is an event whose id is the version; the stream ends with the request."""
    write(world, running(2))
    events = await begun(stream_of(world), running(2))
    assert await anext(events) == b"retry: 2000\n\n"
    assert await anext(events) == shown(running(2))
    write(world, running(3))
    assert await anext(events) == shown(running(3))
    write(world, completed(4))
    assert [event async for event in events] == [shown(completed(4))]
    assert shown(completed(4)).startswith(b'id: 4\nevent: progress\ndata: {"id":"')


async def test_stream_resumes_after_last_event_id(world: World) -> None:
    """A client that comes back with the last id gets only what changed since."""
    write(world, running(3))
    events = await begun(stream_of(world), running(3), last_seen="3")
    await anext(events)
    write(world, completed(4))
    assert [event async for event in events] == [shown(completed(4))]


async def test_idle_stream_sends_comments(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing changes, or S3 is down, the stream sends comments."""
    monkeypatch.setattr(event_stream_module, "HEARTBEAT_INTERVAL_S", 0.0)
    write(world, running(2))
    events = await begun(stream_of(world), running(2), last_seen="2")
    await anext(events)
    assert await anext(events) == HEARTBEAT
    world.store.down = True
    assert [await anext(events) for _ in range(3)] == [HEARTBEAT] * 3
    world.store.down = False
    write(world, completed(3))
    rest = [event async for event in events]
    assert rest[-1] == shown(completed(3))


async def test_stream_ends_at_its_age_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream ends even if its request does not; the client reconnects."""
    monkeypatch.setattr(event_stream_module, "STREAM_AGE_MAX_S", 0.0)
    write(world, running(2))
    assert [event async for event in await begun(stream_of(world), running(2), last_seen="2")] == [b"retry: 2000\n\n"]


@pytest.fixture(name="few_places")
def _few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream_module, "STREAMS_OF_CALLER_MAX", 3)
    monkeypatch.setattr(event_stream_module, "STREAMS_MAX", 4)


@pytest.mark.usefixtures("few_places")
async def test_streams_of_a_key_are_bounded(world: World) -> None:
    """A key gets its streams and no more, however many it opens at once, and leaves the rest to others."""
    write(world, running(2))
    keys = {name: mint_key() for name in ("many", "other")}
    entries = ",".join(f"{name}:read:{digest_of(key)}" for name, key in keys.items())
    with served(world, api_access="keys", api_keys=entries) as address:
        async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=WAIT_MAX_S) as client:

            async def opened(name: str) -> httpx.Response:
                headers = {"X-API-Key": keys[name]}
                return await client.send(client.build_request("GET", EVENTS, headers=headers), stream=True)

            responses = await asyncio.gather(*(opened("many") for _ in range(12)))
            assert Counter(response.status_code for response in responses) == {200: 3, 429: 9}
            refused = next(response for response in responses if response.status_code == 429)
            assert refused.headers["retry-after"]
            assert 'Key "many" has 3 open event streams' in json.loads(await refused.aread())["detail"]
            of_others = await asyncio.gather(*(opened("other") for _ in range(3)))
            assert Counter(response.status_code for response in of_others) == {200: 1, 503: 2}
            for response in (*responses, *of_others):
                await response.aclose()
            await until_open(lambda: opened("many"))


@pytest.mark.usefixtures("few_places")
async def test_a_stream_that_a_client_leaves_at_once_returns_its_place(world: World) -> None:
    """Clients without keys are told apart by their address. A stream that no client reads takes no place for long."""
    write(world, running(2))
    with served(world) as address:
        target = ("127.0.0.1", httpx.URL(address).port or 0)
        for _ in range(20):
            with socket.create_connection(target) as connection:
                connection.sendall(f"GET {EVENTS} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=WAIT_MAX_S) as client:
            for _ in range(3):
                await until_open(lambda: client.send(client.build_request("GET", EVENTS), stream=True))
            over = await client.get(EVENTS)
            assert "Client 127.0.0.1 has 3 open event streams" in over.json()["detail"]


async def until_open(opened: Callable[[], Awaitable[httpx.Response]]) -> None:
    """Open a stream as soon as there is a place."""
    async with asyncio.timeout(WAIT_MAX_S):
        while (response := await opened()).status_code != 200:
            await response.aclose()
            await asyncio.sleep(0.01)


def test_event_stream_is_not_cached_and_ends_with_204(world: World) -> None:
    """The stream has the media type of server-sent events, and no cache keeps it; after the end comes 204."""
    write(world, completed(4))
    with world.client() as client:
        response = client.get(f"/process-requests/{ID}/events")
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.content == b"retry: 2000\n\n" + shown(completed(4))
        over = client.get(f"/process-requests/{ID}/events", headers={"Last-Event-ID": "4"})
        assert (over.status_code, over.content) == (204, b"")
        assert client.get("/process-requests/none/events").status_code == 404


def test_prefer_wait_responds_200_at_the_end(world: World) -> None:
    """``Prefer: wait`` delays the response until the request has ended; its status is then 200."""

    class Quick(Requests):
        async def read(self, text: str) -> RequestRecord:
            record = await super().read(text)
            done = msgspec.structs.replace(completed(9), request_id=record.request_id)
            world.store.write(keys.request(record.request_id), msgspec.json.encode(done))
            return record

    requests = Quick(world.store, world.publisher, clock=world.clock)
    with world.client() as client:
        client.app.state.context.dependencies["event_stream"] = request_stream(requests, StreamPlaces())
        response = client.post(f"/process-request?date={DAY}", headers={"Prefer": "wait=30"})
        assert (response.status_code, response.headers["preference-applied"]) == (200, "wait=30")
        assert response.json()["status"] == "completed"
        assert response.headers["location"] == f"/process-requests/{response.json()['id']}"


def test_prefer_wait_responds_202_after_the_limit(world: World) -> None:
    """If the request has not ended after the wait, the status is 202."""
    with world.client() as client:
        response = client.post(f"/process-request?date={DAY}", headers={"Prefer": "wait=0"})
        assert (response.status_code, response.headers["preference-applied"]) == (202, "wait=0")
        assert "preference-applied" not in client.post(f"/process-request?date={DAY}").headers


async def test_stream_ends_when_the_client_is_no_longer_allowed(world: World) -> None:
    """A stream whose key is revoked ends before the next event."""
    write(world, running(2))
    known = [True, False]
    events = await stream_of(world).events(running(2), "2", caller="Client", allowed=lambda: known.pop(0))
    assert events is not None
    assert await anext(events) == b"retry: 2000\n\n"
    write(world, running(3))
    assert await anext(events) == shown(running(3))
    write(world, running(4))
    assert [event async for event in events] == []
