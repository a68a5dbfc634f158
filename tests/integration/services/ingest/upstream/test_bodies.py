"""Bodies that are truncated, framed wrongly or too long, and responses that are refused."""

from __future__ import annotations

import gzip
import zlib

import brotli
import pytest

from services.ingest.upstream.port import Validators
from shared.runtime import zstd
from tests.integration.services.ingest.upstream.client import (
    BODY,
    DAY,
    GOOD,
    LARGE,
    client_of,
)
from tests.integration.services.ingest.upstream.hostile import (
    Answer,
    HostileServer,
    chunked,
    head_of,
    raw,
    whole,
)


@pytest.mark.parametrize("answer", [GOOD, chunked(BODY), raw(head_of() + BODY)], ids=["length", "chunked", "close"])
async def test_a_whole_file_passes_with_each_framing(answer: Answer) -> None:
    """A file with a length, in chunks, or up to the end of its connection is accepted unchanged."""
    async with HostileServer(answer) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)


BREAKS: dict[str, Answer] = {
    "before the status": raw(b"", reset=True),
    "closed before the status": raw(b""),
    "in the status": raw(b"HTTP/1.1 2", reset=True),
    "in the headers": raw(b"HTTP/1.1 200 OK\r\ncontent-le", reset=True),
    "closed in the headers": raw(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "before the body": raw(head_of(content_length="1000"), reset=True),
    "reset in the body": raw(head_of(content_length=str(len(BODY))) + BODY[:20_000], reset=True),
    "cut in the body": raw(head_of(content_length=str(len(BODY))) + BODY[:20_000]),
    "a length too long by one": raw(head_of(content_length=str(len(BODY) + 1)) + BODY),
    "cut between chunks": chunked(BODY, finished=False),
    "cut in a chunk": raw(head_of(transfer_encoding="chunked") + b"ffff\r\n[{"),
    "no chunk size": raw(head_of(transfer_encoding="chunked") + b"zz\r\n[]\r\n0\r\n\r\n"),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
    "no status": raw(b"HTTP/1.1 two hundred OK\r\n\r\n[]"),
    "no length": raw(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n[]"),
    "an endless length": raw(b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5_000 + b"\r\n\r\n[]"),
    "two lengths": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n[]"),
    "endless headers": raw(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000),
    "a NUL in a header": raw(b"HTTP/1.1 200 OK\r\nx: \0\r\n\r\n[]"),
    "408": whole(b"", 408),
    "425": whole(b"", 425),
    "429": whole(b"", 429),
    "500": whole(b"", 500),
    "502": whole(b"", 502),
    "503": whole(b"", 503),
    "599": whole(b"", 599),
    "gzip that is none": whole(BODY, content_encoding="gzip"),
    "gzip that is cut": whole(gzip.compress(BODY)[:-4], content_encoding="gzip"),
    "gzip with a wrong checksum": whole(gzip.compress(BODY)[:-8] + bytes(8), content_encoding="gzip"),
    "br that is cut": whole(brotli.compress(BODY)[:-1], content_encoding="br"),
    "zstd that is cut": whole(zstd.compress(BODY)[:-1], content_encoding="zstd"),
    "deflate that is cut": whole(zlib.compress(BODY)[:-1], content_encoding="deflate"),
    "gzip that goes on": whole(gzip.compress(BODY) + b"more", content_encoding="gzip"),
    "gzip whose second member is cut": whole(gzip.compress(BODY) + gzip.compress(b" ")[:-1], content_encoding="gzip"),
    "br that goes on": whole(brotli.compress(BODY) + b"more", content_encoding="br"),
    "zstd that goes on": whole(zstd.compress(BODY) + b"more", content_encoding="zstd"),
    "zstd whose second frame is cut": whole(zstd.compress(BODY) + zstd.compress(b" ")[:-1], content_encoding="zstd"),
    "deflate that goes on": whole(zlib.compress(BODY) + b"more", content_encoding="deflate"),
}


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS.keys())
async def test_a_broken_response_costs_an_attempt_and_the_next_one_succeeds(broken: Answer) -> None:
    """After an interrupted response, the file is fetched again, and its bytes are exact."""
    async with HostileServer(broken, GOOD) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)
        assert client.attempts == 2


@pytest.mark.parametrize("kind", ["before the status", "cut in the body", "503", "gzip that is cut"])
async def test_an_upstream_that_always_breaks_fails_the_city_after_its_attempts(kind: str) -> None:
    """The attempts are bounded, and the reason says how many there were, and the URL."""
    async with HostileServer(BREAKS[kind]) as server, client_of(server.url, attempts=2) as client:
        reason = await client.failure()
        assert "(2 attempts)" in reason
        assert f"{server.url}/cities/1/stats?date=2024-05-01" in reason
        assert len(server.requests) == 2


async def test_bytes_after_a_body_are_not_read_as_the_next_response() -> None:
    """A length that is too short cuts the file, which fails; the rest of it does not reach another city."""
    evil = head_of(content_length=str(len(BODY))) + BODY
    short = raw(head_of(content_length="2", connection="keep-alive") + b"[]" + evil)
    async with HostileServer(short, whole(LARGE)) as server, client_of(server.url) as client:
        first = await client.fetch()
        assert first is not None
        assert first.size_bytes == 2
        await client.fetch_exactly(LARGE)
        assert len(server.requests) == 2


async def test_a_file_longer_than_its_content_length_fails() -> None:
    """A file whose stated length is one byte too short fails."""
    async with (
        HostileServer(raw(head_of(content_length=str(len(BODY) - 1)) + BODY)) as server,
        client_of(server.url) as client,
    ):
        await client.failure()


async def test_a_file_over_the_limit_fails_at_once() -> None:
    """A length over the limit is refused at the headers; a body without a length once it exceeds the limit."""
    for answer in (whole(BODY), chunked(BODY), whole(gzip.compress(BODY), content_encoding="gzip")):
        async with HostileServer(answer) as server, client_of(server.url, file_bytes_max=len(BODY) - 1) as client:
            assert "TRIPFOLD_UPSTREAM_FILE_BYTES_MAX" in await client.failure()
            assert len(server.requests) == 1
        async with HostileServer(answer) as server, client_of(server.url, file_bytes_max=len(BODY)) as client:
            await client.fetch_exactly(BODY)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        "text/html",
        "text/html; charset=iso-8859-1",
        "text/plain",
        "text/json",
        "application/x-ndjson; charset=utf-8",
        "application/jsonl",
        "text/x-jsonlines",
        "application/json-lines",
        "application/vnd.transit+json",
        "application/octet-stream",
        "binary/octet-stream",
        "",
    ],
)
async def test_content_types_that_may_hold_json_are_accepted(content_type: str) -> None:
    """Every JSON content type passes, and so do the default types of servers that do not know the type."""
    async with HostileServer(whole(BODY, content_type=content_type)) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)


@pytest.mark.parametrize(
    "content_type", ["application/xml", "image/png", "application/zip", "multipart/byteranges; boundary=x", "nonsense"]
)
async def test_other_content_types_fail_the_city(content_type: str) -> None:
    """A body with another content type fails, even if it looks like JSON."""
    async with HostileServer(whole(BODY, content_type=content_type)) as server, client_of(server.url) as client:
        assert "content-type" in await client.failure()
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 410, 418])
async def test_other_statuses_fail_the_city_at_once(status: int) -> None:
    """A refusal is permanent: it is not retried, and its status is the reason."""
    async with HostileServer(raw(head_of(status, content_length="0"))) as server, client_of(server.url) as client:
        assert f"answered {status}" in await client.failure()
        assert len(server.requests) == 1


async def test_validators_that_cannot_be_sent_back_are_not_kept() -> None:
    """An ETag that no request could carry is dropped; the file counts."""
    for etag in ("x" * 5_000, '"\xfc"', ""):
        async with (
            HostileServer(whole(BODY, etag=etag)) as server,
            client_of(server.url) as client,
            client.upstream.download("1", DAY, None) as download,
        ):
            assert download.validators == Validators()


async def test_cookies_are_not_kept() -> None:
    """The client does not send a cookie of one response with the next request."""
    async with HostileServer(whole(BODY, set_cookie="a=b; path=/")) as server, client_of(server.url) as client:
        await client.fetch()
        await client.fetch()
        assert all("cookie" not in request.headers for request in server.requests)
