"""The city list: bounded like a file; bad entries affect no other city."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from services.ingest.planner.city_list import parse_city_list
from services.ingest.planner.planner import Planner
from services.ingest.upstream import client as upstream_client
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError
from shared.domain import events
from shared.domain.events import IngestCity, ProcessRequested, RequestFailed, RequestPlanned
from shared.domain.ids import RequestId
from shared.domain.topics import Topic
from shared.runtime.settings import Settings
from tests.fakes.builders import Clock
from tests.fakes.handling import handle_all
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.integration.services.ingest.upstream.client import (
    BOMB,
    DAY,
    NOW,
    client_of,
    until,
)
from tests.integration.services.ingest.upstream.hostile import (
    HostileServer,
    chunked,
    head_of,
    raw,
    whole,
)
from tripfold.operate.doctor import CheckFailed, check_city_list


async def test_the_city_list_has_the_limits_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that is too long, a compression bomb, broken or refused fails with the same error as a file."""
    monkeypatch.setattr(upstream_client, "CITY_LIST_BYTES_MAX", 1_000)
    for answer, fault in (
        (whole(b" " * 1_001), PermanentUpstreamError),
        (chunked(b" " * 1_001), PermanentUpstreamError),
        (whole(gzip.compress(BOMB), content_encoding="gzip"), PermanentUpstreamError),
        (whole(b"", 404), PermanentUpstreamError),
        (whole(b"", 500), TransientUpstreamError),
        (raw(head_of(content_length="10") + b"["), TransientUpstreamError),
    ):
        async with HostileServer(answer) as server, client_of(server.url) as client:
            with pytest.raises(fault):
                await client.upstream.cities()
    async with HostileServer(whole(b"[]")) as server, client_of(server.url) as client:
        assert await client.upstream.cities() == b"[]"


async def test_a_missing_city_list_is_reported_as_missing() -> None:
    """A 404 of the list names the setting of the upstream's URL, not a city and a date."""
    async with HostileServer(whole(b"", 404)) as server, client_of(server.url) as client:
        with pytest.raises(PermanentUpstreamError, match="no list of cities; check TRIPFOLD_UPSTREAM_URL"):
            await client.upstream.cities()


async def test_doctor_counts_bad_entries_and_cities_separately() -> None:
    """An entry that is no city is reported with its reason; a list without cities is unfit unless it is allowed."""
    good, bad = b'{"id": 1, "name": "A", "country": "Peru"}', b'{"id": null}'
    async with HostileServer(whole(b"[" + good + b"," + bad + b"]")) as server:
        assert "lists 1 cities, and 1 bad entries" in await check_city_list(Settings(upstream_url=server.url))
    async with HostileServer(whole(b"[" + bad + b"]")) as server:
        with pytest.raises(CheckFailed, match="lists 0 cities, and 1 bad entries"):
            await check_city_list(Settings(upstream_url=server.url))
        allowed = Settings(upstream_url=server.url, upstream_allow_empty_city_list=True)
        assert "lists 0 cities" in await check_city_list(allowed)


async def planned(server: HostileServer) -> tuple[RequestPlanned | RequestFailed, list[IngestCity]]:
    """Plan a request with the list of a server; return how it ended, and its tasks."""
    log = MemoryLog()
    request_id = RequestId("018f38bf-1d00-7000-8000-000000000001")
    requested = ProcessRequested(request_id=request_id, date=DAY, requested_at=NOW)
    log.append(requested.topic, requested.key.encode(), events.encode(requested), [])
    async with client_of(server.url) as client:
        planner = Planner(
            client.store,
            MemoryPublisher(log),
            client.upstream,
            clock=Clock(NOW),
            retry_policy=client.retry_policy,
            allow_no_cities=True,
        )
        await handle_all(planner.process, log.take("planner", Topic.PROCESS_REQUESTS, 1))
    (ended,) = (events.decode(record.topic, record.value) for record in log.records(Topic.REQUEST_PROGRESS))
    tasks = [events.decode(record.topic, record.value) for record in log.records(Topic.CITY_TASKS)]
    assert isinstance(ended, RequestPlanned | RequestFailed)
    return ended, [task for task in tasks if isinstance(task, IngestCity)]


BAD_CITIES = [
    b'{"name": "no id", "country": "Peru"}',
    b'{"id": null, "name": "A", "country": "Peru"}',
    b'{"id": 1.5, "name": "A", "country": "Peru"}',
    b'{"id": true, "name": "A", "country": "Peru"}',
    b'{"id": [], "name": "A", "country": "Peru"}',
    b'{"id": "", "name": "A", "country": "Peru"}',
    b'{"id": "..", "name": "A", "country": "Peru"}',
    b'{"id": "\\u002e", "name": "A", "country": "Peru"}',
    b'{"id": 1' + b"0" * 10_000 + b', "name": "A", "country": "Peru"}',
    b'{"id": "' + b"x" * 10_000 + b'", "name": "A", "country": "Peru"}',
    b'{"id": "\\ud800", "name": "A", "country": "Peru"}',
    b'{"id": 7}',
    b'{"id": 7, "name": "", "country": "Peru"}',
    b'{"id": 7, "name": " ", "country": "Peru"}',
    b'{"id": 7, "name": 7, "country": "Peru"}',
    b'{"id": 7, "name": "A"}',
    b'{"id": 7, "name": "' + "é".encode() * 10_000 + b'", "country": "Peru"}',
    b'{"id": 7, "name": "\\udfff", "country": "Peru"}',
    b'{"id": 7, "name": "\xff", "country": "Peru"}',
    b'{"id": 7, "name": "A", "country": "' + b"\\ud83d" * 300 + b'"}',
    b"7",
    b"null",
    b'"7"',
    b"[]",
    b'{"id": 0, "name": "a duplicate", "country": "Peru"}',
]


async def test_bad_cities_are_left_out_and_named_and_the_others_count() -> None:
    """Bad entries of the city list are reported, and all other cities are planned."""
    good = [
        {"id": number, "name": name, "country": country}
        for number, (name, country) in enumerate(
            [
                ("Port Tina", "Armenia"),
                ("x" * 300, "Россия"),
                ("\x00\x01\n", "Rossiia"),
                ("👩‍👩‍👧\u202e", "🇫🇷"),
                ("é" * 300, "../../etc"),
                ("\U0010ffff", "\x7f"),
                ("a", "+"),
            ]
        )
    ]
    entries = [json.dumps(city).encode() for city in good] + BAD_CITIES
    async with HostileServer(whole(b"[" + b",".join(entries) + b"]")) as server:
        ended, tasks = await planned(server)
    assert isinstance(ended, RequestPlanned)
    assert sorted(task.upstream_id for task in tasks) == [str(city["id"]) for city in good]
    assert len({task.country for task in tasks}) == len(good)
    assert ended.bad_cities_count == len(BAD_CITIES) == len(ended.bad_cities)


@pytest.mark.parametrize("body", [b"", b"null", b"{}", b"[", b"[1", b"[{}", b"[]]", b"[,]", b"[" * 100_000, b"\xff[]"])
async def test_a_body_that_is_no_list_fails_the_request_with_its_reason(body: bytes) -> None:
    """A body that is no JSON array fails the request, and does not block the planner."""
    async with HostileServer(whole(body)) as server:
        ended, tasks = await planned(server)
    assert isinstance(ended, RequestFailed)
    assert "not a JSON array" in ended.reason
    assert not tasks


async def test_a_list_of_100_000_cities_does_not_block_the_event_loop() -> None:
    """While a long list is parsed the event loop runs, and every city gets its task."""
    cities = [{"id": number, "name": f"Город {number}", "country": f"C{number % 200}"} for number in range(100_000)]
    turns = turns_before = turns_after = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    async with HostileServer(whole(json.dumps(cities).encode())) as server, client_of(server.url) as client:
        body = await client.upstream.cities()
        turning = asyncio.create_task(turn())
        await until(lambda: turns > 0)
        turns_before = turns
        listed = await asyncio.to_thread(parse_city_list, body)
        turns_after = turns
        turning.cancel()
        assert len(listed.cities) == 100_000
        assert turns_after - turns_before > 10
        ended, tasks = await planned(server)
    assert isinstance(ended, RequestPlanned)
    assert ended.cities == len(tasks) == 100_000
