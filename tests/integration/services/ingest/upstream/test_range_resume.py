"""Broken downloads resume at the next byte of the same file, or not at all."""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
from email.utils import format_datetime

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.ingest.upstream import client as upstream_client
from tests.integration.services.ingest.upstream.client import (
    BODY,
    LARGE,
    client_of,
    redirect,
    resumptions,
    until,
)
from tests.integration.services.ingest.upstream.hostile import (
    OLD,
    Answer,
    Connection,
    HostileServer,
    RangeServer,
    Request,
    head_of,
    raw,
    whole,
)


@given(cuts=st.lists(st.integers(0, len(LARGE) - 1), max_size=6), chunks=st.booleans(), reset=st.booleans())
@example(cuts=[0, 0, 0], chunks=False, reset=False)
@example(cuts=[len(LARGE) - 1], chunks=True, reset=False)
@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_broken_download_resumes_at_the_next_byte(cuts: list[int], chunks: bool, reset: bool) -> None:
    """Wherever and however often a download is cut, each byte arrives once, and no attempt is used."""
    ranges = RangeServer(LARGE, cuts=list(cuts), chunked=chunks)
    ranges.reset = reset
    async with HostileServer(ranges) as server, client_of(server.url, attempts=1) as client:
        await client.fetch_exactly(LARGE)
        assert client.attempts == 1
        assert [request.first_byte for request in server.requests] == sorted(
            request.first_byte for request in server.requests
        )


async def test_last_modified_is_a_validator_where_there_is_no_etag() -> None:
    """A date that is old enough is a strong validator too."""
    ranges = RangeServer(LARGE, cuts=[200_000, 300_000], etag=None)
    ranges.last_modified = OLD
    before = resumptions()
    async with HostileServer(ranges) as server, client_of(server.url, attempts=1) as client:
        await client.fetch_exactly(LARGE)
        assert [request.headers.get("if-range") for request in server.requests] == [None, OLD, OLD]
    assert resumptions() - before == 2, "the metric counts each"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"etag": 'W/"v1"'},
        {"etag": "v1"},
        {"etag": '"v1"', "accept_ranges": "none"},
        {"last_modified": OLD},
        {"last_modified": format_datetime(dt.datetime.now(dt.UTC)), "date": format_datetime(dt.datetime.now(dt.UTC))},
        {"etag": '"v1"', "content_encoding": "gzip"},
    ],
)
async def test_a_broken_download_without_a_strong_validator_restarts(headers: dict[str, str]) -> None:
    """Weak tags, young dates, codings and servers without ranges: the next request is for the whole file."""
    body = gzip.compress(LARGE) if "content_encoding" in headers else LARGE
    cut = raw(head_of(content_length=str(len(body)), **headers) + body[:50_000])
    async with HostileServer(cut, whole(body, **headers)) as server, client_of(server.url) as client:
        await client.fetch_exactly(LARGE)
        assert client.attempts == 2
        assert all("range" not in request.headers for request in server.requests)


REST = LARGE[50_000:]


SPAN = f"bytes 50000-{len(LARGE) - 1}/{len(LARGE)}"


WRONG_RESTS: dict[str, Answer] = {
    "the whole file": whole(LARGE, etag='"v1"'),
    "another file": whole(BODY, etag='"v2"'),
    "a changed ETag": whole(REST, 206, content_range=SPAN, etag='"v2"'),
    "no content-range": whole(REST, 206, etag='"v1"'),
    "another start": whole(REST, 206, content_range=f"bytes 49999-{len(LARGE) - 2}/{len(LARGE)}", etag='"v1"'),
    "another total": whole(REST, 206, content_range=f"bytes 50000-{len(LARGE)}/{len(LARGE) + 1}", etag='"v1"'),
    "no total": whole(REST, 206, content_range=f"bytes 50000-{len(LARGE) - 1}/*", etag='"v1"'),
    "not up to the end": whole(REST[:10], 206, content_range=f"bytes 50000-50009/{len(LARGE)}", etag='"v1"'),
    "more than it says": raw(head_of(206, content_range=SPAN, etag='"v1"') + REST + b" "),
    "another coding": whole(REST, 206, content_range=SPAN, etag='"v1"', content_encoding="gzip"),
    "not satisfiable": whole(b"", 416, content_range=f"bytes */{len(LARGE)}"),
    "gone": whole(b"", 404),
    "unchanged": raw(head_of(304)),
}


@pytest.mark.parametrize("rest", WRONG_RESTS.values(), ids=WRONG_RESTS.keys())
async def test_a_part_of_another_file_restarts_the_download(rest: Answer) -> None:
    """A part that may belong to another file is refused, and the next attempt fetches the whole file."""
    cut = raw(head_of(content_length=str(len(LARGE)), etag='"v1"') + LARGE[:50_000])
    async with HostileServer(cut, rest, whole(LARGE, etag='"v1"')) as server, client_of(server.url) as client:
        await client.fetch_exactly(LARGE)
        assert client.attempts == 2
        assert [request.headers.get("range") for request in server.requests] == [None, "bytes=50000-", None]
        assert server.requests[1].headers["if-range"] == '"v1"'


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_resumption_retries_transient_statuses(status: int) -> None:
    """A transient status in the middle of a download is retried; so is a reset."""
    cut = raw(head_of(content_length=str(len(LARGE)), etag='"v1"') + LARGE[:50_000])
    rest = whole(REST, 206, content_range=SPAN, etag='"v1"')
    async with (
        HostileServer(cut, whole(b"", status), raw(b"", reset=True), rest) as server,
        client_of(server.url, attempts=1) as client,
    ):
        await client.fetch_exactly(LARGE)


async def test_a_download_resumes_after_a_restart_of_the_server() -> None:
    """A download resumes with the same file after its server was down for a while."""
    ranges = RangeServer(LARGE, cuts=[70_000])
    async with HostileServer(ranges) as server, client_of(server.url, attempts=1, resumptions=100) as client:
        fetching = asyncio.create_task(client.fetch_exactly(LARGE))
        await until(lambda: bool(server.requests))
        server._server.close()
        await until(lambda: bool(client.retrier.health.faults))
        reopened = await asyncio.start_server(server._serve, "127.0.0.1", server.port)
        await fetching
        reopened.close()
        assert client.attempts == 1
        assert not client.retrier.health.faults


async def test_resumptions_are_bounded() -> None:
    """The number of requests to a server that sends a byte at a time is bounded."""

    async def one_byte(request: Request, connection: Connection) -> None:
        start = request.first_byte
        span = {"content_range": f"bytes {start}-{len(LARGE) - 1}/{len(LARGE)}"} if start else {}
        await connection.send(
            head_of(206 if start else 200, content_length=str(len(LARGE) - start), etag='"v1"', **span)
        )
        await connection.send(LARGE[start : start + 1])

    async with HostileServer(one_byte) as server, client_of(server.url, attempts=2, resumptions=3) as client:
        assert "(2 attempts)" in await client.failure()
        assert len(server.requests) == 2 * (1 + 3)


@pytest.mark.parametrize("resumptions", [1, 10])
async def test_an_upstream_that_goes_down_in_every_download_fails_the_city(
    resumptions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted response costs an attempt also if the rest cannot be requested: attempts are bounded."""
    monkeypatch.setattr(upstream_client, "RESUME_OUTAGE_LIMIT_S", 0.1)
    begun = raw(head_of(content_length=str(len(LARGE)), etag='"v1"') + LARGE[:50_000])

    async def gone_for_the_rest(request: Request, connection: Connection) -> None:
        await (redirect("http://127.0.0.1:1/") if "range" in request.headers else begun)(request, connection)

    async with (
        HostileServer(gone_for_the_rest) as server,
        client_of(server.url, attempts=2, resumptions=resumptions, redirect_hosts="127.0.0.1:1") as client,
    ):
        async with asyncio.timeout(30):
            reason = await client.failure()
        assert "broke off after" in reason
        assert "cannot be reached" in reason
        assert "(2 attempts)" in reason
