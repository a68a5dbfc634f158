"""The client of the upstream against a server that misbehaves: every answer ends in the file, or in a named fault.

The fault model: a server that answers anything at all, byte by byte, as slowly as it likes, and breaks off anywhere.
Not in it: a server that gives a well-formed, complete and valid file of other trips.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import gzip
import hashlib
import json
import random
import ssl
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import format_datetime
from functools import partial
from pathlib import Path

import brotli
import msgspec
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.ingest import persistence, upstream
from services.ingest.identity import parse_city_list
from services.ingest.persistence import Circuit, Persistence
from services.ingest.planner import Planner
from services.ingest.streaming import FileRefused, Meter, Streamed, stream_file
from services.ingest.upstream import AnswerBroke, CityFailed, HttpUpstream, UpstreamDown, Validators
from services.operate.doctor import Unfit, city_list
from shared import events, zstd
from shared.events import IngestCity, ProcessRequested, RequestFailed, RequestPlanned
from shared.health import REGISTRY, Health
from shared.identity import RequestId
from shared.patience import Patience, Stopping
from shared.settings import Settings
from shared.topics import Topic
from tests.fakes import Clock, MemoryLog, MemoryPublisher, MemoryStore
from tests.integration.hostile import (
    OLD,
    Answer,
    Connection,
    HostileServer,
    RangeServer,
    Request,
    chunked,
    head_of,
    raw,
    trickled,
    whole,
)

DAY = dt.date(2024, 5, 1)
NOW = dt.datetime(2024, 5, 2, tzinfo=dt.UTC)


def make_file(trips: int) -> bytes:
    """Write a trip file in which every record differs."""
    draw = random.Random(trips)
    return json.dumps(
        [
            {
                "departure-time": f"2024-05-01T{number % 24:02}:{draw.randrange(60):02}:00",
                "bus-type": f"BUS-{draw.randrange(10**6)}",
                "passengers": draw.randrange(90),
                "delay": f"PT{draw.randrange(5000)}S",
                "accident": False,
            }
            for number in range(trips)
        ]
    ).encode()


BODY = make_file(500)
LARGE = make_file(8_000)
GOOD = whole(BODY, etag='"v1"')


class VirtualPatience(Patience):
    """Waits no time, and notes how long it would have waited."""

    def __init__(self) -> None:
        super().__init__(health=Health(), wait_max_s=1)
        self.time_s = 1_000.0

    def now_s(self) -> float:
        return self.time_s

    async def sleep(self, seconds: float) -> None:
        self.time_s += seconds
        await asyncio.sleep(0)


class Client(msgspec.Struct):
    """The client under test, as the ingest wires it, and a bucket in memory."""

    upstream: HttpUpstream
    persistence: Persistence
    patience: Patience
    store: MemoryStore
    threads: ThreadPoolExecutor
    attempts: int = 0

    async def attempt(self, city: str = "1", known: Validators | None = None) -> Streamed | None:
        """Stream a city-day's file into the bucket, once; None if it is unchanged."""
        self.attempts += 1
        async with self.upstream.download(city, DAY, known) as download:
            if download.chunks is None:
                return None
            upload = self.store.upload(f"raw/{city}")
            streamed = await stream_file(
                download.chunks, upload, date=DAY.isoformat(), meter=Meter(), threads=self.threads
            )
            await upload.complete()
            return streamed

    async def drain(self, taken: list[int], *, pause_s: float = 0) -> None:
        """Take a city-day's file at leisure, and note how long each piece of it is."""
        async with self.upstream.download("1", DAY, None) as download:
            assert download.chunks is not None
            async for chunk in download.chunks:
                taken.append(len(chunk))
                await asyncio.sleep(pause_s)

    async def fetch(self, city: str = "1") -> Streamed | None:
        """Stream a city-day's file into the bucket, with all the persistence of the ingest."""
        return await self.persistence.fetch(lambda: self.attempt(city))

    async def fetch_exactly(self, body: bytes) -> None:
        """Fetch, and check that every byte came, once, to the bucket, the hash and the parser."""
        streamed = await self.fetch()
        assert streamed is not None
        assert self.store.objects["raw/1"].body == body
        assert streamed.sha256 == hashlib.sha256(body).hexdigest()
        assert (streamed.size_bytes, streamed.folded.contribution.trips) == (len(body), len(json.loads(body)))

    async def failure(self) -> str:
        """Fetch what cannot be had, and return the reason; nothing may be stored."""
        with pytest.raises((CityFailed, FileRefused)) as caught:
            await self.fetch()
        assert not self.store.objects
        return str(caught.value)


@contextlib.asynccontextmanager
async def client_of(url: str, patience: Patience | None = None, **changes: object) -> AsyncIterator[Client]:
    """Give a client of the upstream at ``url``; ``changes`` are settings without ``upstream_``."""
    given = {"attempts": 3, "read_timeout_s": 5, "requests_per_s": 10_000, "outage_limit_s": 0.3, **changes}
    settings = Settings.model_validate({"upstream_url": url, **{f"upstream_{name}": given[name] for name in given}})
    patience = patience or Patience(health=Health(), wait_max_s=1)
    circuit = Circuit(patience, retry_after_max_s=settings.upstream_retry_after_max_s)
    keeping = Persistence(
        patience,
        circuit,
        attempts_max=settings.upstream_attempts,
        outage_limit_s=settings.upstream_outage_limit_s,
        concurrency_max=settings.upstream_concurrency_max,
    )
    with ThreadPoolExecutor(8) as threads:
        async with HttpUpstream(settings, circuit) as http:
            yield Client(http, keeping, patience, MemoryStore(Clock(NOW)), threads)


def counted(outcome: str) -> float:
    """Return how many requests have ended so."""
    value = REGISTRY.get_sample_value("tripfold_upstream_requests_total", {"outcome": outcome})
    return value or 0.0


def resumptions() -> float:
    """Return how many downloads have gone on where they broke."""
    return REGISTRY.get_sample_value("tripfold_upstream_resumptions_total") or 0.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; fail loudly if it does not come to."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what is looked at has no event
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _hardly_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "WAIT_FIRST_S", 0.01)
    monkeypatch.setattr(persistence, "WAIT_MAX_S", 0.05)
    monkeypatch.setattr(persistence, "PROBE_LOOK_S", 0.01)


@pytest.mark.parametrize("answer", [GOOD, chunked(BODY), raw(head_of() + BODY)], ids=["length", "chunked", "close"])
async def test_a_whole_file_passes_however_its_end_is_told(answer: Answer) -> None:
    """A file with a length, in chunks, or up to the end of its connection is taken as it is."""
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
async def test_a_broken_answer_costs_an_attempt_and_the_next_one_succeeds(broken: Answer) -> None:
    """After an answer that broke, wherever it did, the file is fetched anew, and is exactly the file."""
    async with HostileServer(broken, GOOD) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)
        assert client.attempts == 2


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS.keys())
async def test_an_upstream_that_always_breaks_fails_the_city_after_its_attempts(broken: Answer) -> None:
    """The attempts are bounded, and the reason says how many there were, and the URL."""
    async with HostileServer(broken) as server, client_of(server.url, attempts=2) as client:
        reason = await client.failure()
        assert "(2 attempts)" in reason
        assert f"{server.url}/cities/1/stats?date=2024-05-01" in reason
        assert len(server.requests) == 2


async def test_what_follows_a_body_is_not_read_as_the_next_answer() -> None:
    """A length that is too short cuts the file, which fails; the rest of it does not reach another city."""
    evil = head_of(content_length=str(len(BODY))) + BODY
    short = raw(head_of(content_length="2", connection="keep-alive") + b"[]" + evil)
    async with HostileServer(short, whole(LARGE)) as server, client_of(server.url) as client:
        first = await client.fetch()
        assert first is not None
        assert first.size_bytes == 2
        await client.fetch_exactly(LARGE)
        assert len(server.requests) == 2


async def test_a_file_that_its_length_cuts_fails_as_no_whole_document() -> None:
    """A length that is too short by one is taken at its word, or the byte after it breaks the answer."""
    async with (
        HostileServer(raw(head_of(content_length=str(len(BODY) - 1)) + BODY)) as server,
        client_of(server.url) as client,
    ):
        await client.failure()


SLOW: dict[str, tuple[Answer, str]] = {
    "silence before the status": (raw(b"", stalled=True), "stalled"),
    "silence in the headers": (raw(b"HTTP/1.1 200 OK\r\n", stalled=True), "stalled"),
    "silence in the body": (raw(head_of(content_length="1000") + b"[", stalled=True), "stalled"),
    "silence in a chunk": (raw(head_of(transfer_encoding="chunked") + b"ff\r\n[", stalled=True), "stalled"),
    "a byte at a time": (trickled(head_of(content_length="100000"), b" " * 100_000), "bytes a second"),
}


@pytest.mark.parametrize(("answer", "reason"), SLOW.values(), ids=SLOW.keys())
async def test_silence_and_a_trickle_cost_an_attempt(answer: Answer, reason: str) -> None:
    """Neither a stall nor a byte now and then holds a stream."""
    async with (
        HostileServer(answer) as server,
        client_of(server.url, read_timeout_s=0.2, speed_window_s=0.1, attempts=2) as client,
    ):
        failure = await client.failure()
        assert reason in failure
        assert "(2 attempts)" in failure


async def test_headers_that_trickle_are_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of an answer has one deadline, however often a byte of it comes."""
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT_S", 0.2)
    async with (
        HostileServer(trickled(b"HTTP/1.1 200 OK\r\nx: ", b"y" * 10_000)) as server,
        client_of(server.url, read_timeout_s=0.2, attempts=1) as client,
    ):
        assert "stalled" in await client.failure()


@pytest.mark.parametrize("framing", [b"2;", b"2\r\n[]\r\n0\r\nx: "], ids=["an extension", "a trailer"])
async def test_what_frames_the_chunks_of_a_body_may_not_trickle(framing: bytes) -> None:
    """Bytes that are none of the file, however often one comes, do not keep a stream that waits for some."""
    answer = trickled(head_of(transfer_encoding="chunked") + framing, b"y" * 10_000)
    async with HostileServer(answer) as server, client_of(server.url, read_timeout_s=1, attempts=1) as client:
        async with asyncio.timeout(30):
            assert "stalled" in await client.failure()


async def test_an_answer_has_a_deadline() -> None:
    """An answer that is fast enough at any time, and never ends, is broken off."""

    async def endless(_request: Request, connection: Connection) -> None:
        await connection.send(head_of(transfer_encoding="chunked"))
        while True:
            await connection.send(b"4\r\n    \r\n")
            await asyncio.sleep(0.01)

    async with (
        HostileServer(endless) as server,
        client_of(server.url, deadline_s=0.2, bytes_per_s_min=0, attempts=1) as client,
    ):
        assert "TRIPFOLD_UPSTREAM_DEADLINE_S" in await client.failure()


async def test_a_slow_bucket_is_not_blamed_on_the_upstream() -> None:
    """Only the time spent waiting for the upstream counts for its speed."""
    async with HostileServer(chunked(LARGE)) as server, client_of(server.url, speed_window_s=0.05) as client:
        taken: list[int] = []
        await client.drain(taken, pause_s=0.01)
        assert sum(taken) == len(LARGE)


async def test_a_file_over_the_limit_fails_at_once() -> None:
    """A length over the limit is refused at the head; a body without a length, once it is over it."""
    for answer in (whole(BODY), chunked(BODY), whole(gzip.compress(BODY), content_encoding="gzip")):
        async with HostileServer(answer) as server, client_of(server.url, file_bytes_max=len(BODY) - 1) as client:
            assert "TRIPFOLD_UPSTREAM_FILE_BYTES_MAX" in await client.failure()
            assert len(server.requests) == 1
        async with HostileServer(answer) as server, client_of(server.url, file_bytes_max=len(BODY)) as client:
            await client.fetch_exactly(BODY)


BOMB = b"[" + b" " * 100_000_000
CODINGS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": lambda body: brotli.compress(body, quality=1),
    "zstd": zstd.compress,
}


@pytest.mark.parametrize("coding", CODINGS.keys())
async def test_a_compression_bomb_is_stopped_early(coding: str) -> None:
    """A body that inflates beyond the ratio fails its city, before more than a little of it was inflated."""
    async with (
        HostileServer(whole(CODINGS[coding](BOMB), content_encoding=coding)) as server,
        client_of(server.url) as client,
    ):
        taken: list[int] = []
        with pytest.raises(CityFailed, match="TRIPFOLD_UPSTREAM_RATIO_MAX"):
            await client.drain(taken)
        assert max(taken) <= 8 * 1024**2
        assert sum(taken) <= upstream.RATIO_FREE_BYTES + 8 * 1024**2


@pytest.mark.parametrize("coding", CODINGS.keys())
async def test_every_coding_that_is_asked_for_is_undone(coding: str) -> None:
    """The bucket, the hash and the parser get the file itself, whatever coding it came in."""
    coded = CODINGS[coding](LARGE)
    async with HostileServer(whole(coded, content_encoding=coding)) as server, client_of(server.url) as client:
        await client.fetch_exactly(LARGE)


UNUSUAL_STREAMS = {
    "deflate without zlib": ("deflate", zlib.compress(LARGE)[2:-4]),
    "members of gzip": ("gzip", gzip.compress(LARGE[:5_000]) + gzip.compress(b"") + gzip.compress(LARGE[5_000:])),
    "frames of zstd": (
        "zstd",
        zstd.compress(LARGE[:5_000]) + b"\x50\x2a\x4d\x18\x03\0\0\0..." + zstd.compress(LARGE[5_000:]),
    ),
}


@pytest.mark.parametrize(("coding", "coded"), UNUSUAL_STREAMS.values(), ids=UNUSUAL_STREAMS.keys())
async def test_every_form_of_a_coding_is_undone(coding: str, coded: bytes) -> None:
    """Streams in several parts, empty and skipped ones among them, and deflate as some servers write it, are files."""
    async with HostileServer(whole(coded, content_encoding=coding)) as server, client_of(server.url) as client:
        await client.fetch_exactly(LARGE)


@pytest.mark.parametrize("coding", ["compress", "gzip, gzip", "aes128gcm", "\xff"])
async def test_a_coding_that_was_not_asked_for_fails_the_city(coding: str) -> None:
    """Codings on top of each other, and unknown ones, are a fact, not a fault that passes."""
    async with HostileServer(whole(BODY, content_encoding=coding)) as server, client_of(server.url) as client:
        assert "content-encoding" in await client.failure()
        assert len(server.requests) == 1


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
async def test_content_types_that_may_hold_json_are_taken(content_type: str) -> None:
    """JSON by any of its names passes, and so do the types of servers that do not know what they serve."""
    async with HostileServer(whole(BODY, content_type=content_type)) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)


@pytest.mark.parametrize(
    "content_type", ["application/xml", "image/png", "application/zip", "multipart/byteranges; boundary=x", "nonsense"]
)
async def test_other_content_types_fail_the_city(content_type: str) -> None:
    """What says that it is no JSON is believed, even if it looks like it."""
    async with HostileServer(whole(BODY, content_type=content_type)) as server, client_of(server.url) as client:
        assert "content-type" in await client.failure()
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 410, 418])
async def test_other_statuses_fail_the_city_at_once(status: int) -> None:
    """A refusal is a fact: it is not tried again, and its status is the reason."""
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
    """Nothing that one answer sets is sent with the next request."""
    async with HostileServer(whole(BODY, set_cookie="a=b; path=/")) as server, client_of(server.url) as client:
        await client.fetch()
        await client.fetch()
        assert all("cookie" not in request.headers for request in server.requests)


def redirect(location: str, status: int = 302) -> Answer:
    """Answer with a redirect."""
    return whole(b"", status, location=location)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_on_the_same_host_are_followed(status: int) -> None:
    """The file behind some redirects is the file; its own URL stays the one that was asked for."""
    answers = [redirect("/elsewhere?x=1", status), redirect("deeper", status), GOOD]
    async with HostileServer(*answers) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)
        assert [request.target for request in server.requests][1:] == ["/elsewhere?x=1", "/deeper"]


async def test_a_url_is_sent_as_it_is_written() -> None:
    """The escapes of a URL stay as they are: a signed one is valid in no other spelling."""
    signed = "/a%2Fb/%41?signature=%2F%3D%2B%20%7e+a"
    async with HostileServer(redirect(signed), GOOD) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)
        assert server.requests[1].target == signed
        assert not any(name.startswith("x-") for request in server.requests for name in request.headers)


async def test_a_redirect_loop_fails_the_city() -> None:
    """Redirects are followed up to a bound."""
    async with HostileServer(redirect("/cities/1/stats?date=2024-05-01")) as server, client_of(server.url) as client:
        assert "more than 5 times" in await client.failure()
        assert len(server.requests) == 6


@pytest.mark.parametrize("location", ["http://localhost:{port}/x", "http://127.0.0.1:1/", "//localhost:{port}/"])
async def test_a_redirect_to_another_host_is_refused(location: str) -> None:
    """Nothing is asked of a host or port that the settings do not name."""
    async with (
        HostileServer(GOOD) as other,
        HostileServer(redirect(location.format(port=other.port))) as server,
        client_of(server.url) as client,
    ):
        assert "TRIPFOLD_UPSTREAM_REDIRECT_HOSTS" in await client.failure()
        assert not other.requests


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://[", "http://a:b:c/", "\x01"])
async def test_a_redirect_to_what_is_no_web_address_is_refused(location: str) -> None:
    """A location of another scheme, or that cannot be read, fails the city."""
    async with HostileServer(redirect(location)) as server, client_of(server.url, attempts=1) as client:
        await client.failure()
        assert len(server.requests) == 1


@pytest.mark.parametrize("named", ["localhost", "example.com,localhost:{port}"])
async def test_a_redirect_to_a_named_host_is_followed(named: str) -> None:
    """The setting names hosts, or hosts with a port."""
    async with (
        HostileServer(GOOD) as other,
        HostileServer(redirect(f"http://localhost:{other.port}/x")) as server,
        client_of(server.url, redirect_hosts=named.format(port=other.port)) as client,
    ):
        await client.fetch_exactly(BODY)


async def test_a_login_is_shown_to_the_upstream_alone(tmp_path: Path) -> None:
    """Each request to the upstream carries name and password (RFC 7617); a host that it redirects to gets neither."""
    password = tmp_path / "password"
    password.write_text("open:sesame\n")
    async with (
        HostileServer(GOOD) as other,
        HostileServer(redirect("/moved"), redirect(f"http://localhost:{other.port}/x")) as server,
        client_of(server.url, redirect_hosts="localhost", username="worker", password_file=str(password)) as client,
    ):
        await client.fetch_exactly(BODY)
        login = f"Basic {base64.b64encode(b'worker:open:sesame').decode()}"
        assert [request.headers["authorization"] for request in server.requests] == [login, login]
        assert all("authorization" not in request.headers for request in other.requests)


def self_signed(folder: Path) -> ssl.SSLContext:
    """Make a certificate that nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    start = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    certificate = (
        builder.not_valid_before(start).not_valid_after(start + dt.timedelta(days=2)).sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8
    path = folder / "server.pem"
    path.write_bytes(key.private_bytes(pem, plain, serialization.NoEncryption()) + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


async def test_a_certificate_that_nobody_vouches_for_is_an_outage(tmp_path: Path) -> None:
    """Without trust nothing is asked; the reason is the city's once the outage was too long."""
    async with HostileServer(GOOD, tls=self_signed(tmp_path)) as server, client_of(server.url) as client:
        assert "CERTIFICATE_VERIFY_FAILED" in await client.failure()
        assert not server.requests


@pytest.mark.parametrize("url", ["http://no-such-host.invalid", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
async def test_an_upstream_that_cannot_be_reached_costs_no_attempt(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve, a closed port and a port without TLS are outages: waited out, up to the limit."""
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT_S", 0.1)
    async with (
        HostileServer(raw(b"not TLS\r\n")) as server,
        client_of(url.format(port=server.port), attempts=1) as client,
    ):
        reason = await client.failure()
        assert "cannot be reached" in reason
        assert "(1 attempts)" not in reason
        assert client.attempts > 1
        assert client.patience.health.faults.keys() == {"upstream"}


@given(cuts=st.lists(st.integers(0, len(LARGE) - 1), max_size=6), chunks=st.booleans(), reset=st.booleans())
@example(cuts=[0, 0, 0], chunks=False, reset=False)
@example(cuts=[len(LARGE) - 1], chunks=True, reset=False)
@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_broken_download_goes_on_at_the_next_byte(cuts: list[int], chunks: bool, reset: bool) -> None:
    """Wherever and however often a download is cut, no byte is missing, none comes twice, and no attempt is spent."""
    ranges = RangeServer(LARGE, cuts=list(cuts), chunked=chunks)
    ranges.reset = reset
    async with HostileServer(ranges) as server, client_of(server.url, attempts=1) as client:
        await client.fetch_exactly(LARGE)
        assert client.attempts == 1
        assert [request.first_byte for request in server.requests] == sorted(
            request.first_byte for request in server.requests
        )


async def test_last_modified_serves_where_there_is_no_etag() -> None:
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
async def test_without_a_strong_validator_a_broken_download_begins_again(headers: dict[str, str]) -> None:
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
async def test_a_rest_that_does_not_fit_begins_the_file_again(rest: Answer) -> None:
    """What may not be the rest of the same file is not taken: the next attempt is for the whole file."""
    cut = raw(head_of(content_length=str(len(LARGE)), etag='"v1"') + LARGE[:50_000])
    async with HostileServer(cut, rest, whole(LARGE, etag='"v1"')) as server, client_of(server.url) as client:
        await client.fetch_exactly(LARGE)
        assert client.attempts == 2
        assert [request.headers.get("range") for request in server.requests] == [None, "bytes=50000-", None]
        assert server.requests[1].headers["if-range"] == '"v1"'


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_resumption_outlasts_a_server_that_is_busy(status: int) -> None:
    """A status that may pass is waited out in mid-download; so is a reset."""
    cut = raw(head_of(content_length=str(len(LARGE)), etag='"v1"') + LARGE[:50_000])
    rest = whole(REST, 206, content_range=SPAN, etag='"v1"')
    async with (
        HostileServer(cut, whole(b"", status), raw(b"", reset=True), rest) as server,
        client_of(server.url, attempts=1) as client,
    ):
        await client.fetch_exactly(LARGE)


async def test_a_resumption_outlasts_a_restart_of_the_server() -> None:
    """A server that is gone for a while in mid-download goes on with the same file."""
    ranges = RangeServer(LARGE, cuts=[70_000])
    async with HostileServer(ranges) as server, client_of(server.url, attempts=1, resumptions=100) as client:
        fetching = asyncio.create_task(client.fetch_exactly(LARGE))
        await until(lambda: bool(server.requests))
        server._server.close()
        await until(lambda: bool(client.patience.health.faults))
        reopened = await asyncio.start_server(server._serve, "127.0.0.1", server.port)
        await fetching
        reopened.close()
        assert client.attempts == 1
        assert not client.patience.health.faults


async def test_resumptions_are_bounded() -> None:
    """A server that gives a byte at a time does not get asked for ever."""

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


@pytest.mark.parametrize("resumptions", [1, 100])
async def test_an_upstream_that_goes_down_in_every_download_fails_the_city(
    resumptions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that broke costs an attempt also if there was nobody to ask for the rest: attempts are bounded."""
    monkeypatch.setattr(upstream, "RESUME_OUTAGE_LIMIT_S", 0.1)
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


async def test_a_city_whose_host_alone_is_down_fails_while_others_are_served() -> None:
    """That other files can be had does not begin the outage of one anew: it fails after the limit of an outage."""

    async def one_elsewhere(request: Request, connection: Connection) -> None:
        answer = redirect("http://127.0.0.1:1/") if request.target.startswith("/cities/1/") else GOOD
        await answer(request, connection)

    async with (
        HostileServer(one_elsewhere) as server,
        client_of(server.url, redirect_hosts="127.0.0.1:1", outage_limit_s=2) as client,
    ):
        failing = asyncio.create_task(client.failure())
        async with asyncio.timeout(30):
            while not failing.done():
                await client.persistence.fetch(partial(client.attempt, "2"))
                client.store.objects.clear()
        assert "cannot be reached" in await failing


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_is_honoured_by_every_stream(status: int, form: str) -> None:
    """Nobody asks before the time that the upstream named, be it seconds or a date."""
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=120)
    busy = whole(b"", status, retry_after="100" if form == "seconds" else format_datetime(at, usegmt=True))
    patience = VirtualPatience()
    async with HostileServer(busy, GOOD) as server, client_of(server.url, patience) as client:
        asked_at_s = patience.time_s
        with pytest.raises(AnswerBroke):
            async with client.persistence._circuit.turn(since_s=0, outage_limit_s=1):
                await client.attempt()
        await client.fetch("another")
        assert patience.time_s - asked_at_s >= 100
        assert patience.time_s - asked_at_s < 130


async def test_a_retry_after_beyond_reason_is_bounded() -> None:
    """A year is not waited for, and neither is a date that cannot be read."""
    for written in ("31536000", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "soon", "-5", "Wed, 99 Foo 0000"):
        patience = VirtualPatience()
        async with (
            HostileServer(whole(b"", 503, retry_after=written), GOOD) as server,
            client_of(server.url, patience, retry_after_max_s=50) as client,
        ):
            await client.fetch_exactly(BODY)
            assert patience.time_s - 1_000 < 60


async def test_requests_are_kept_apart() -> None:
    """Of all streams together no more requests are made in a second than the settings say."""
    patience = VirtualPatience()
    async with HostileServer(GOOD) as server, client_of(server.url, patience, requests_per_s=2) as client:
        await asyncio.gather(*(client.fetch(str(city)) for city in range(7)))
        assert patience.time_s - 1_000 >= 3.0


async def test_requests_side_by_side_are_bounded() -> None:
    """Of many streams only so many ask at a time."""

    async def slow(request: Request, connection: Connection) -> None:
        await asyncio.sleep(0.02)
        await GOOD(request, connection)

    async with HostileServer(slow) as server, client_of(server.url, concurrency_max=3) as client:
        await asyncio.gather(*(client.fetch(str(city)) for city in range(12)))
        assert server.busy_max == 3
        assert len(server.requests) == 12


async def test_of_many_streams_one_asks_whether_the_upstream_is_back() -> None:
    """While the upstream is down its streams wait; one probes at a time, and when it is back all go on."""
    asking = asking_max = asked = 0
    reached = False
    patience = Patience(health=Health(), wait_max_s=1)
    circuit = Circuit(patience)
    keeping = Persistence(patience, circuit, attempts_max=1, outage_limit_s=60)

    async def attempt() -> int:
        nonlocal asking, asking_max, asked
        asked += 1
        asking += 1
        asking_max = max(asking_max, asking)
        await asyncio.sleep(0.005)
        asking -= 1
        if not reached:
            raise UpstreamDown("nobody there")
        return 1

    with contextlib.suppress(UpstreamDown):
        async with circuit.turn(since_s=0, outage_limit_s=60):
            await attempt()
    fetching = [asyncio.create_task(keeping.fetch(attempt)) for _ in range(20)]
    await until(lambda: asked >= 6)
    assert asking_max == 1
    assert patience.health.faults == {"upstream": "nobody there"}
    reached = True
    assert sum(await asyncio.gather(*fetching)) == 20
    assert not patience.health.faults


async def fail_in_turn(circuit: Circuit, error: Exception, *before: Exception) -> None:
    """Let a request end with ``error``; while it was under way, others ended with those ``before``."""
    async with circuit.turn(since_s=0, outage_limit_s=60):
        for other in before:
            with contextlib.suppress(type(other)):
                await fail_in_turn(circuit, other)
        raise error


async def test_an_outage_is_logged_at_its_start_and_at_its_end_with_its_duration() -> None:
    """An outage leaves two lines in the log, however many streams and probes find the upstream down."""
    patience = VirtualPatience()
    circuit = Circuit(patience)
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            with pytest.raises(UpstreamDown):
                await fail_in_turn(circuit, UpstreamDown("nobody there"), UpstreamDown("nobody there"))
        patience.time_s += 660
        circuit.reached()
        circuit.reached()
    began, ended = logged
    assert (began["event"], began["error"]) == ("upstream_unreachable", "nobody there")
    assert ended["event"] == "upstream_reachable_again"
    assert ended["outage_s"] >= 660


async def test_a_probe_that_is_cancelled_lets_another_probe() -> None:
    """A stream that is aborted while it probes leaves the circuit as it was."""
    circuit = Circuit(Patience(health=Health(), wait_max_s=1))
    with pytest.raises(UpstreamDown):
        await fail_in_turn(circuit, UpstreamDown("nobody there"))

    async def never() -> None:
        async with circuit.turn(since_s=0, outage_limit_s=60):
            await asyncio.sleep(3600)

    probing = asyncio.create_task(never())
    await until(lambda: circuit._probe is not None)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    assert circuit.patience.health.faults
    async with asyncio.timeout(10), circuit.turn(since_s=0, outage_limit_s=60):
        pass
    assert not circuit.patience.health.faults


async def test_what_was_asked_before_an_outage_does_not_end_it() -> None:
    """A download that breaks when the upstream goes does not send the waiting streams ahead."""
    patience = VirtualPatience()
    circuit = Circuit(patience)
    with pytest.raises(AnswerBroke):
        await fail_in_turn(circuit, AnswerBroke("cut"), UpstreamDown("nobody there"))
    assert patience.health.faults == {"upstream": "nobody there"}


async def test_a_probe_that_was_answered_before_an_outage_does_not_end_it() -> None:
    """A download that began as a probe, and breaks when the upstream goes again, is as old as any other."""
    patience = VirtualPatience()
    circuit = Circuit(patience)
    with pytest.raises(UpstreamDown):
        await fail_in_turn(circuit, UpstreamDown("nobody there"))

    async def break_after_an_outage() -> None:
        async with circuit.turn(since_s=0, outage_limit_s=60):
            circuit.reached()
            with contextlib.suppress(UpstreamDown):
                await fail_in_turn(circuit, UpstreamDown("gone again"))
            raise AnswerBroke("cut")

    with pytest.raises(AnswerBroke):
        await break_after_an_outage()
    assert patience.health.faults == {"upstream": "gone again"}


async def test_a_stream_that_waits_gives_up_when_the_process_stops() -> None:
    """Waiting for the upstream ends at once when the process is asked to stop."""
    patience = Patience(health=Health(), wait_max_s=1)
    async with client_of("http://127.0.0.1:1", patience, outage_limit_s=3600) as client:
        fetching = asyncio.create_task(client.fetch())
        await until(lambda: bool(patience.health.faults))
        patience.stopping.set()
        with pytest.raises(Stopping):
            await fetching


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (GOOD, "complete"),
        (raw(head_of(304)), "unchanged"),
        (whole(b"", 404), "refused"),
        (whole(b"", 500), "broke"),
        (raw(head_of(content_length="9") + b"["), "broke"),
        (whole(b"{}" + b" " * 5_000_000), "complete"),
        (whole(gzip.compress(BOMB), content_encoding="gzip"), "abandoned"),
        (whole(b"", 302, location="http://example.com/"), "redirected"),
    ],
)
async def test_requests_are_counted_once_by_how_they_ended(answer: Answer, outcome: str) -> None:
    """One request is one in the metric, under what became of it."""
    outcomes = ("complete", "unchanged", "redirected", "refused", "broke", "down", "abandoned")
    before = {name: counted(name) for name in outcomes}
    async with HostileServer(answer) as server, client_of(server.url) as client:
        with contextlib.suppress(AnswerBroke, CityFailed, FileRefused):
            await client.attempt(known=Validators(etag='"v1"'))
    assert {name: counted(name) - before[name] for name in outcomes} == {
        name: float(name == outcome) for name in outcomes
    }


@given(st.binary(max_size=300), st.booleans(), st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", head_of()]))
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_bytes_end_in_a_named_fault(data: bytes, reset: bool, before: bytes) -> None:
    """Whatever a server sends, the client says which of its faults it is, and raises nothing else."""
    async with HostileServer(raw(before + data, reset=reset)) as server, client_of(server.url) as client:
        with contextlib.suppress(AnswerBroke, CityFailed, FileRefused):
            await client.attempt()


@given(
    st.dictionaries(
        st.sampled_from(
            ["etag", "last_modified", "date", "content_type", "content_encoding", "retry_after", "location", "age"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40),
    ),
    st.sampled_from([200, 204, 206, 301, 304, 307, 404, 416, 429, 503]),
)
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_headers_end_in_a_file_or_a_named_fault(headers: dict[str, str], status: int) -> None:
    """No header can do more than fail its city; what is kept of it can be sent back."""
    async with HostileServer(whole(b"[]", status, **headers)) as server, client_of(server.url) as client:
        with contextlib.suppress(AnswerBroke, CityFailed, FileRefused):
            async with client.upstream.download("1", DAY, None) as download:
                validators = download.validators
            with contextlib.suppress(AnswerBroke, CityFailed, FileRefused):
                await client.attempt(known=validators)


async def test_the_list_of_cities_is_as_bounded_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that is too long, a bomb, a broken or a refused one is told apart like a file is."""
    monkeypatch.setattr(upstream, "CITY_LIST_BYTES_MAX", 1_000)
    for answer, fault in (
        (whole(b" " * 1_001), CityFailed),
        (chunked(b" " * 1_001), CityFailed),
        (whole(gzip.compress(BOMB), content_encoding="gzip"), CityFailed),
        (whole(b"", 404), CityFailed),
        (whole(b"", 500), AnswerBroke),
        (raw(head_of(content_length="10") + b"["), AnswerBroke),
    ):
        async with HostileServer(answer) as server, client_of(server.url) as client:
            with pytest.raises(fault):
                await client.upstream.cities()
    async with HostileServer(whole(b"[]")) as server, client_of(server.url) as client:
        assert await client.upstream.cities() == b"[]"


async def test_a_missing_list_of_cities_is_told_as_such() -> None:
    """A 404 of the list names the setting of the upstream's URL, not a city and a date."""
    async with HostileServer(whole(b"", 404)) as server, client_of(server.url) as client:
        with pytest.raises(CityFailed, match="no list of cities; check TRIPFOLD_UPSTREAM_URL"):
            await client.upstream.cities()


async def test_doctor_counts_bad_entries_apart_from_cities() -> None:
    """An entry that is no city is told with its reason; a list without a city is unfit unless it is allowed."""
    good, bad = b'{"id": 1, "name": "A", "country": "Peru"}', b'{"id": null}'
    async with HostileServer(whole(b"[" + good + b"," + bad + b"]")) as server:
        assert "lists 1 cities, and 1 bad entries" in await city_list(Settings(upstream_url=server.url))
    async with HostileServer(whole(b"[" + bad + b"]")) as server:
        with pytest.raises(Unfit, match="lists 0 cities, and 1 bad entries"):
            await city_list(Settings(upstream_url=server.url))
        allowed = Settings(upstream_url=server.url, upstream_allow_no_cities=True)
        assert "lists 0 cities" in await city_list(allowed)


async def planned(server: HostileServer) -> tuple[RequestPlanned | RequestFailed, list[IngestCity]]:
    """Plan a request against the list that a server gives; return how it ended, and its tasks."""
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
            persistence=client.persistence,
            allow_no_cities=True,
        )
        await planner.process(log.take("planner", Topic.PROCESS_REQUESTS, 1))
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
    """Whatever is wrong with some entries of the list, it costs no other city its statistics."""
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
async def test_what_is_no_list_fails_the_request_with_its_reason(body: bytes) -> None:
    """A body that is no JSON array ends the request, and does not hold the planner."""
    async with HostileServer(whole(body)) as server:
        ended, tasks = await planned(server)
    assert isinstance(ended, RequestFailed)
    assert "not a JSON array" in ended.reason
    assert not tasks


async def test_a_list_of_100_000_cities_is_parsed_beside_the_event_loop() -> None:
    """While a long list is parsed the loop goes on turning, and every city of it gets its task."""
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
