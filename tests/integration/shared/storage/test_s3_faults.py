"""Every error response of a store is a dependency outage, not a CAS conflict or a missing object."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from shared.domain.ids import utc_now
from shared.domain.keys import WRITE_CHECK
from shared.runtime.settings import load_settings
from shared.storage import s3
from shared.storage.object_store import (
    UPLOAD_PART_BYTES,
    AdminObjectStore,
    ObjectStore,
    StoreUnavailable,
    UnfinishedUpload,
)
from shared.storage.s3 import S3Store

KEY = "summaries/generation=1/date=2024-05-01/country=peru.json"
ETAG = '"d41d8cd98f00b204e9800998ecf8427e"'


class Fault(msgspec.Struct, frozen=True):
    """The response of a store to every request: status and error code."""

    status: int
    code: str


FAULTS = {
    "an expired credential": Fault(400, "ExpiredToken"),
    "a credential that was withdrawn": Fault(403, "InvalidAccessKeyId"),
    "a wrong signature": Fault(403, "SignatureDoesNotMatch"),
    "a missing permission": Fault(403, "AccessDenied"),
    "a clock that is wrong by a day": Fault(403, "RequestTimeTooSkewed"),
    "a deleted bucket": Fault(404, "NoSuchBucket"),
    "a full disk": Fault(507, "InsufficientStorage"),
    "a full disk, as others say it": Fault(500, "InternalError"),
    "a quota": Fault(403, "QuotaExceeded"),
    "too many requests": Fault(503, "SlowDown"),
    "a method that is not there": Fault(501, "NotImplemented"),
}


async def read_whole(store: AdminObjectStore) -> None:
    """Read an object chunk by chunk."""
    async for _ in store.stream(KEY):
        pass


async def list_all(store: ObjectStore) -> None:
    """List objects."""
    async for _ in store.list("summaries/"):
        pass


async def list_uploads(store: AdminObjectStore) -> None:
    """List unfinished uploads."""
    async for _ in store.unfinished_uploads("raw/"):
        pass


async def upload_small(store: ObjectStore) -> None:
    """Upload an object of one part."""
    upload = store.upload(KEY)
    await upload.write(b"1")
    await upload.complete()


async def upload_large(store: ObjectStore) -> None:
    """Upload an object of two parts."""
    upload = store.upload(KEY)
    try:
        await upload.write(bytes(UPLOAD_PART_BYTES))
        await upload.write(b"1")
        await upload.complete()
    finally:
        await upload.abort()


CALLS: dict[str, Callable[[S3Store], Awaitable[object]]] = {
    "get": lambda store: store.get(KEY),
    "get the head": lambda store: store.get(KEY, first_bytes=10),
    "create": lambda store: store.compare_and_swap(KEY, b"1", etag=None),
    "swap": lambda store: store.compare_and_swap(KEY, b"1", etag=ETAG),
    "put": lambda store: store.put(KEY, b"1"),
    "list": list_all,
    "stream": read_whole,
    "delete": lambda store: store.delete(KEY),
    "upload of one part": upload_small,
    "upload of two parts": upload_large,
    "list uploads": list_uploads,
    "check": lambda store: store.check(),
    "now": lambda store: store.now(),
}


@contextlib.asynccontextmanager
async def answering(answer: Callable[[str], bytes]) -> AsyncIterator[S3Store]:
    """Run a store that sends one response to every request of a method, and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length:")]
            if "100-continue" in head.lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await reader.readexactly(int(length[0]) if length else 0)
            writer.write(answer(head.split(" ")[0]))
            await writer.drain()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
    port = server.sockets[0].getsockname()[1]
    settings = load_settings({"TRIPFOLD_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}", "TRIPFOLD_S3_BUCKET": "bucket"})
    async with server, S3Store(settings) as store:
        yield store


@pytest.fixture(autouse=True)
def _without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    backoff = {"init_backoff": dt.timedelta(milliseconds=1), "max_backoff": dt.timedelta(milliseconds=1)}
    monkeypatch.setattr(s3, "FEW_RETRIES", {**s3.FEW_RETRIES, "backoff": backoff})
    monkeypatch.setattr(s3, "CONFLICT_WAITS_S", (*(0 for _ in s3.CONFLICT_WAITS_S[:-1]), None))
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
async def test_a_failed_response_is_a_fault(fault: Fault) -> None:
    """Each method raises StoreUnavailable, with the store's own word for it where there is one."""
    body = f"<Error><Code>{fault.code}</Code><Message>no</Message></Error>".encode()

    def answer(method: str) -> bytes:
        head = f"HTTP/1.1 {fault.status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        return head if method == "HEAD" else head + body

    async with answering(answer) as store:
        results = await asyncio.gather(*(call(store) for call in CALLS.values()), return_exceptions=True)
    for name, result in zip(CALLS, results, strict=True):
        assert isinstance(result, StoreUnavailable), f"{name}: {result!r}"
        assert name in {"check", "now"} or fault.code in str(result), f"{name}: {result}"


async def test_a_response_that_breaks_off_is_a_fault() -> None:
    """A body shorter than it was said to be is not taken for an object, in no method that reads one."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: " + ETAG.encode() + b"\r\nConnection: close\r\n\r\n"
    async with answering(lambda _: head + b'{"schema_version":1') as store:
        for name, operation in (("get", "Get"), ("get the head", "Get"), ("stream", "Get"), ("list", "List")):
            with pytest.raises(StoreUnavailable, match=f"^S3 {operation}Object"):
                await CALLS[name](store)


async def test_an_invalid_response_is_a_fault() -> None:
    """A connection that closes without a response is an outage, also after a write that may have conflicted."""
    async with answering(lambda _: b"") as store:
        results = await asyncio.gather(*(call(store) for call in CALLS.values()), return_exceptions=True)
        unfinished = UnfinishedUpload(key=KEY, upload_id="x", begun_at=utc_now())
        with pytest.raises(StoreUnavailable):
            await store.abort_upload(unfinished)
    assert {
        name for name, result in zip(CALLS, results, strict=True) if not isinstance(result, StoreUnavailable)
    } == set()


ENTRY = (
    f"<Contents><Key>{KEY}</Key><LastModified>2024-05-02T10:00:00.000Z</LastModified>"
    f"<ETag>&quot;1&quot;</ETag><Size>1</Size></Contents>"
)


@pytest.mark.parametrize(
    "listing",
    [
        f"<KeyCount>1</KeyCount><IsTruncated>true</IsTruncated>{ENTRY}",
        f"<KeyCount>2</KeyCount><IsTruncated>false</IsTruncated>{ENTRY}",
    ],
    ids=["more to come, and not where", "fewer entries than counted"],
)
async def test_an_incomplete_listing_is_a_fault(listing: str) -> None:
    """A page without all that it tells of is never taken for all that there is."""
    body = f"<ListBucketResult><Name>bucket</Name>{listing}</ListBucketResult>".encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    async with answering(lambda _: head + body) as store:
        with pytest.raises(StoreUnavailable):
            await list_all(store)


async def test_a_listing_continues_after_keys_that_others_write_meanwhile() -> None:
    """A key that is written behind the last one while a listing ends is listed too, and is no outage."""
    later = f"{KEY}.later"
    pages = [ENTRY, ENTRY.replace(KEY, later), ""]

    def page(_method: str) -> bytes:
        body = f"<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{pages.pop(0)}</ListBucketResult>"
        return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()

    async with answering(page) as store:
        assert [entry.key async for entry in store.list(KEY[: KEY.rfind("/") + 1])] == [KEY, later]
    assert pages == []


@pytest.mark.parametrize("field", ["", "ETag: \r\n"], ids=["no ETag", "an empty ETag"])
async def test_a_response_without_an_etag_is_an_outage(field: str) -> None:
    """A response without an ETag is an error for reads and writes, although the write may have happened."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n{field}Connection: close\r\n\r\n1".encode()
    async with answering(lambda _: head) as store:
        for name, operation in (("get", "Get"), ("create", "Put"), ("swap", "Put")):
            with pytest.raises(StoreUnavailable, match=f"^S3 {operation}Object of ({KEY}|{WRITE_CHECK}): .*ETag"):
                await CALLS[name](store)
        with pytest.raises(StoreUnavailable, match=f"^S3 HeadObject of {KEY}: the response has no ETag$"):
            await store.get(KEY, first_bytes=0)
