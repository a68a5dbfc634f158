"""The bucket: a port that the services use, and its adapter over S3.

Two things about S3 shape this port. Compare-and-swap is a PutObject with ``If-Match`` or ``If-None-Match``, used on
small objects alone: racing conditional multipart uploads are not exact on every store. And an answer can be lost: a
write that failed may have happened, so whoever loses a race reads again before deciding anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import email.utils
import gzip
import json
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Protocol, Self

import aioboto3
import aiohttp
import msgspec
from aiobotocore.session import AioSession, get_session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError
from botocore.handlers import add_expect_header
from botocore.loaders import JSONFileLoader
from botocore.utils import parse_timestamp

from shared.bounded import map_bounded
from shared.kept_connections import Declined
from shared.part import Part
from shared.patience import SurroundingsFault
from shared.quick_requests import Conflict, NotMet, Page, QuickRequests, bucket_url_of, proxy_of
from shared.settings import Settings

UPLOAD_PART_BYTES = 5 * 1024 * 1024
UPLOAD_PARTS_IN_FLIGHT_MAX = 2
CREDENTIALS_INTERVAL_S = 2.0
UPLOAD_PARTS_MAX = 10_000
COPY_PART_BYTES = 256 * 1024 * 1024
"""What is larger is copied in parts of this size: S3 copies 5 GiB at once, and some stores not that much in time."""
COPY_PARTS_IN_FLIGHT_MAX = 4
STREAM_CHUNK_BYTES = 1024 * 1024
# botocore wraps what goes wrong before an answer's body, and not a body that breaks off: that is aiohttp's own error.
NO_ANSWER = (TimeoutError, BotoCoreError, OSError, aiohttp.ClientError)
LIST_PAGE_KEYS = 1_000  # the most that S3 gives at once


class StoreUnavailable(SurroundingsFault):
    """The store cannot be used now: unreachable, throttling, refusing the credentials. Wait, then try again."""


class LostRace(RuntimeError):
    """Somebody else wrote the object first, or an earlier try of ours did: read it again.

    There may be nothing to read: a store can answer for as long as one asks that a conflict is not decided yet.
    """


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """An object as it was read: its bytes, and the ETag that a swap has to name."""

    body: bytes
    etag: str


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """An object as a listing shows it."""

    key: str
    etag: str
    size_bytes: int
    last_modified: dt.datetime


class Upload(Protocol):
    """A new object under way, written from front to back. Nothing is visible before ``complete``."""

    async def write(self, chunk: bytes) -> None:
        """Append ``chunk``; waits while too many parts are in flight."""

    async def complete(self) -> None:
        """Make the object visible, whole."""

    async def abort(self) -> None:
        """Give the upload up and leave nothing. Safe to call at any time, also after ``complete``."""


class ObjectStore(Protocol):
    """What the services need of a bucket. Every method raises StoreUnavailable when the store cannot be used."""

    async def get(self, key: str, *, first_bytes: int | None = None) -> Found | None:
        """Read an object, or its first bytes, or return None if there is none."""

    async def swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        """Write an object only if its ETag still is ``etag`` (None: only if there is none); return the new ETag.

        Raises LostRace if it is not so.
        """

    async def put(self, key: str, body: bytes) -> None:
        """Write an object whose key nobody else writes."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Listed]:
        """List the objects under ``prefix``, page by page, in the store's order.

        With ``after``, only those whose key is past it.
        """

    def upload(self, key: str) -> Upload:
        """Begin a new object of unknown size, whose key nobody else writes."""

    async def copy(self, source: str, target: str, *, size_bytes: int) -> None:
        """Copy an object of ``size_bytes`` to a key that nobody else writes, inside the store."""

    async def delete(self, key: str) -> None:
        """Delete an object; it is no fault if there is none."""


class ObjectMissing(RuntimeError):
    """There is no object under the key."""


class UnfinishedUpload(msgspec.Struct, frozen=True, kw_only=True):
    """A multipart upload that was begun, and neither completed nor aborted."""

    key: str
    upload_id: str
    begun_at: dt.datetime


class OperatedStore(ObjectStore, Protocol):
    """What an operator's commands need of a bucket beyond the services."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """Read an object of any size, chunk by chunk. Raises ObjectMissing if there is none."""

    async def now(self) -> dt.datetime:
        """Return the time by the store's own clock, which ``last_modified`` and ``begun_at`` are of too."""

    def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        """List the multipart uploads under ``prefix`` that were begun and not ended."""

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        """Give up an upload that whoever began it has left behind; it is no fault if it has ended since."""


class S3Store:
    """An OperatedStore in an S3 bucket. Use it as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.bucket = settings.s3_bucket
        self._client: Any = None
        self._quick: QuickRequests | None = None
        self._closing = contextlib.AsyncExitStack()
        self._spent = contextlib.AsyncExitStack()
        self._opened_at_s = 0.0

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def _open(self) -> None:
        """Make a client, which finds its credentials now and keeps them. The one before may still be in use."""
        settings = self._settings
        self._opened_at_s = time.monotonic()
        config = Config(
            connect_timeout=5,
            read_timeout=30,  # racing writers of one key can be made to wait for seconds by the store
            max_pool_connections=settings.s3_pool_size,
            retries={"mode": "standard", "total_max_attempts": 3},
            request_checksum_calculation=settings.s3_checksums,
            response_checksum_validation=settings.s3_checksums,
            signature_version="s3v4",
            s3={"addressing_style": settings.s3_addressing_style},
        )
        closing = contextlib.AsyncExitStack()
        session = aioboto3.Session(botocore_session=_botocore_session())
        client = await closing.enter_async_context(
            session.client(
                "s3",
                endpoint_url=settings.s3_endpoint_url,
                region_name=settings.s3_region,
                verify=settings.s3_ca_file or None,
                config=config,
            )
        )
        # A part is a file to the client, which would ask for leave (100-continue), and wait for it, before each.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        quick = await self._quick_requests(session, client.meta.endpoint_url, closing)
        await self._spent.aclose()
        self._client, self._quick, self._closing, self._spent = client, quick, closing, self._closing

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._spent.aclose()
        await self._closing.aclose()

    async def _quick_requests(
        self, session: Any, endpoint_url: str, closing: contextlib.AsyncExitStack
    ) -> QuickRequests | None:
        settings = self._settings

        def bucket_url() -> str | None:
            return bucket_url_of(endpoint_url, self.bucket, settings.s3_addressing_style)

        url = bucket_url()
        if url is None or proxy_of(url) is not None or settings.s3_checksums == "when_supported":
            return None
        try:
            credentials = await session.get_credentials()
        except BotoCoreError:
            credentials = None  # botocore tells so at the first request
        if credentials is None:
            return None
        quick = QuickRequests(
            bucket_url=bucket_url,
            region=settings.s3_region,
            credentials=credentials.get_frozen_credentials,
            pool_size=settings.s3_pool_size,
            ca_file=settings.s3_ca_file,
        )
        return await closing.enter_async_context(quick)

    async def check(self) -> None:
        """Raise StoreUnavailable if the bucket cannot be reached with these credentials.

        Credentials that are refused are looked up again: a file of them may have been corrected, a role renewed.
        """
        try:
            await self._client.head_bucket(Bucket=self.bucket)
        except (ClientError, *NO_ANSWER) as error:
            refused = isinstance(error, ClientError) and _status(error) in {400, 401, 403}
            if refused or isinstance(error, (NoCredentialsError, CredentialRetrievalError)):
                await self._look_credentials_up()
            raise _unavailable("HeadBucket", self.bucket, error) from error

    async def _look_credentials_up(self) -> None:
        if time.monotonic() - self._opened_at_s >= CREDENTIALS_INTERVAL_S:
            with _faults("client", self.bucket):
                await self._open()

    async def create_bucket(self) -> None:
        """Create the bucket unless it is there."""
        try:
            await self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            if _status(error) != 404:
                raise _unavailable("HeadBucket", self.bucket, error) from error
        except BotoCoreError as error:
            raise _unavailable("HeadBucket", self.bucket, error) from error
        else:
            return
        location = {"LocationConstraint": self._settings.s3_region}
        extra = {} if self._settings.s3_region == "us-east-1" else {"CreateBucketConfiguration": location}
        with _faults("CreateBucket", self.bucket):
            await self._client.create_bucket(Bucket=self.bucket, **extra)

    async def get(self, key: str, *, first_bytes: int | None = None) -> Found | None:
        if self._quick is not None:
            with contextlib.suppress(Declined):
                read = await self._quick.get(key, first_bytes=first_bytes)
                return None if read is None else Found(body=read[0], etag=read[1])
        extra = {} if first_bytes is None else {"Range": f"bytes=0-{first_bytes - 1}"}
        try:
            answer = await self._client.get_object(Bucket=self.bucket, Key=key, **extra)
            async with answer["Body"] as stream:
                body = await stream.read()
        except ClientError as error:
            if _status(error) == 404 and _code(error) in {"NoSuchKey", "404"}:
                return None
            raise _unavailable("GetObject", key, error) from error
        except NO_ANSWER as error:
            raise _unavailable("GetObject", key, error) from error
        return Found(body=body, etag=_etag_of(answer, "GetObject", key))

    async def swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        for wait_s in (0.05, 0.2, 0.8, None):
            try:
                return await self._swap_once(key, body, etag)
            except Conflict as error:
                if wait_s is None:
                    raise LostRace(key) from error
                await asyncio.sleep(wait_s)
            except NotMet as error:
                raise LostRace(key) from error
        raise AssertionError("the last try neither answered nor raised")

    async def _swap_once(self, key: str, body: bytes, etag: str | None) -> str:
        if self._quick is not None:
            with contextlib.suppress(Declined):
                return await self._quick.swap(key, body, etag=etag)
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        try:
            answer = await self._client.put_object(
                Bucket=self.bucket, Key=key, Body=body, ContentType="application/json", **condition
            )
        except ClientError as error:
            if _status(error) == 409:
                raise Conflict(key) from error
            # Stores differ on If-Match for a missing key: 404 here, 412 there.
            if _status(error) == 412 or (_status(error) == 404 and _code(error) == "NoSuchKey"):
                raise NotMet(key) from error
            raise _unavailable("PutObject", key, error) from error
        except NO_ANSWER as error:
            raise _unavailable("PutObject", key, error) from error
        return _etag_of(answer, "PutObject", key)

    async def put(self, key: str, body: bytes) -> None:
        with _faults("PutObject", key):
            await self._client.put_object(Bucket=self.bucket, Key=key, Body=body, ContentType="application/json")

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Listed]:
        first = await self._quick_page(prefix, after=after, token=None)
        if first is not None:
            following: Page | None = first
            while following is not None:
                for key, etag, size_bytes, last_modified in following.entries:
                    yield Listed(key=key, etag=etag, size_bytes=size_bytes, last_modified=last_modified)
                if following.next_token is None:
                    return
                following = await self._quick_page(prefix, after="", token=following.next_token)
            raise StoreUnavailable(f"the listing of {prefix} broke off")
        start = {"StartAfter": after} if after else {}
        with _faults("ListObjectsV2", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix, PaginationConfig={"PageSize": LIST_PAGE_KEYS}, **start
            )
            async for page in pages:
                _require_whole(page, prefix)
                for entry in page.get("Contents", ()):
                    yield Listed(
                        key=entry["Key"],
                        etag=entry["ETag"],
                        size_bytes=entry["Size"],
                        last_modified=entry["LastModified"],
                    )

    async def _quick_page(self, prefix: str, *, after: str, token: str | None) -> Page | None:
        """Return a page of a listing, or None if botocore has to be asked."""
        for wait_s in (0.1, 0.5, None):
            if self._quick is None:
                return None
            try:
                return await self._quick.page(prefix, keys_max=LIST_PAGE_KEYS, after=after, token=token)
            except Declined:
                if wait_s is None or token is None:
                    return None
                await asyncio.sleep(wait_s)
        raise AssertionError("the last try neither answered nor declined")

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        try:
            answer = await self._client.get_object(Bucket=self.bucket, Key=key)
        except ClientError as error:
            if _status(error) == 404 and _code(error) in {"NoSuchKey", "404"}:
                raise ObjectMissing(key) from error
            raise _unavailable("GetObject", key, error) from error
        except NO_ANSWER as error:
            raise _unavailable("GetObject", key, error) from error
        body = answer["Body"]
        try:
            with _faults("GetObject", key):
                async for chunk in body.iter_chunks(STREAM_CHUNK_BYTES):
                    yield chunk
        finally:
            body.close()

    async def delete(self, key: str) -> None:
        with _faults("DeleteObject", key):
            await self._client.delete_object(Bucket=self.bucket, Key=key)

    async def copy(self, source: str, target: str, *, size_bytes: int) -> None:
        origin = {"Bucket": self.bucket, "Key": source}
        if size_bytes <= COPY_PART_BYTES:
            with _faults("CopyObject", target):
                await self._client.copy_object(Bucket=self.bucket, Key=target, CopySource=origin)
            return
        into = {"Bucket": self.bucket, "Key": target}
        with _faults("CreateMultipartUpload", target):
            answer = await self._client.create_multipart_upload(**into, ContentType="application/json")
        upload_id = answer["UploadId"]

        async def copy_part(start: int) -> dict[str, Any]:
            number = start // COPY_PART_BYTES + 1
            last = min(start + COPY_PART_BYTES, size_bytes) - 1
            with _faults("UploadPartCopy", target):
                copied = await self._client.upload_part_copy(
                    **into,
                    UploadId=upload_id,
                    PartNumber=number,
                    CopySource=origin,
                    CopySourceRange=f"bytes={start}-{last}",
                )
            return {"PartNumber": number, "ETag": copied["CopyPartResult"]["ETag"]}

        try:
            starts = range(0, size_bytes, COPY_PART_BYTES)
            parts = await map_bounded(copy_part, starts, at_once_max=COPY_PARTS_IN_FLIGHT_MAX)
            with _faults("CompleteMultipartUpload", target):
                await self._client.complete_multipart_upload(
                    **into, UploadId=upload_id, MultipartUpload={"Parts": parts}
                )
        except BaseException:
            # What cannot be aborted now is an unfinished upload, which the clean-up takes by its age.
            with contextlib.suppress(ClientError, *NO_ANSWER):
                await self._client.abort_multipart_upload(**into, UploadId=upload_id)
            raise

    async def now(self) -> dt.datetime:
        with _faults("HeadBucket", self.bucket):
            answer = await self._client.head_bucket(Bucket=self.bucket)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise StoreUnavailable("S3 HeadBucket answered without a Date: the store's clock cannot be read")
        return email.utils.parsedate_to_datetime(date)

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        with _faults("ListMultipartUploads", prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=prefix, PaginationConfig={"PageSize": LIST_PAGE_KEYS}
            )
            async for page in pages:
                for entry in page.get("Uploads", ()):
                    yield UnfinishedUpload(key=entry["Key"], upload_id=entry["UploadId"], begun_at=entry["Initiated"])

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        try:
            await self._client.abort_multipart_upload(
                Bucket=self.bucket, Key=unfinished.key, UploadId=unfinished.upload_id
            )
        except ClientError as error:
            if _status(error) != 404:
                raise _unavailable("AbortMultipartUpload", unfinished.key, error) from error
        except NO_ANSWER as error:
            raise _unavailable("AbortMultipartUpload", unfinished.key, error) from error

    def upload(self, key: str) -> Upload:
        return _S3Upload(self._client, self.bucket, key)


def _botocore_session() -> AioSession:
    """Return a session that reads the times of listings fast: botocore's own way costs 70 ms a page of 1,000 keys."""
    session = get_session()
    factory = session.get_component("response_parser_factory")
    factory.set_parser_defaults(timestamp_parser=_parse_time)
    session.get_component("data_loader").file_loader = _DescriptionLoader()
    return session


class _DescriptionLoader(JSONFileLoader):  # type: ignore[misc]  # botocore publishes no types
    """Reads the descriptions of services into plain dictionaries, which take 4 MB less than ordered ones."""

    def load_file(self, file_path: str) -> Any:
        for suffix, opened in ((".json", open), (".json.gz", gzip.open)):
            with contextlib.suppress(FileNotFoundError), opened(file_path + suffix, "rb") as file:
                return json.loads(file.read())
        return None


def _parse_time(value: str) -> dt.datetime:
    try:
        return dt.datetime.fromisoformat(value)
    except ValueError:  # in headers, times are written as in HTTP
        return parse_timestamp(value)  # type: ignore[no-any-return]  # botocore publishes no types


class _S3Upload:
    """A multipart upload with a bounded number of parts in flight; an object of one part is one PutObject.

    Parts are filled in a few buffers that are used over and over: memory that the system gave is cleared only once.
    """

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self._client = client
        self._target = {"Bucket": bucket, "Key": key}
        self._key = key
        self._upload_id: str | None = None
        self._filling: bytearray | None = None
        self._filled_bytes = 0
        self._spare: list[bytearray] = []
        self._parts: list[asyncio.Task[dict[str, Any]]] = []
        self._room = asyncio.Semaphore(UPLOAD_PARTS_IN_FLIGHT_MAX)
        self._done = False

    async def write(self, chunk: bytes) -> None:
        taken = 0
        while taken < len(chunk):
            # A full part is sent only once more has come: a file of exactly one part is one PutObject too.
            if self._filled_bytes == UPLOAD_PART_BYTES:
                await self._send()
            if self._filling is None:
                self._filling = self._spare.pop() if self._spare else bytearray(UPLOAD_PART_BYTES)
            some = memoryview(chunk)[taken : taken + UPLOAD_PART_BYTES - self._filled_bytes]
            memoryview(self._filling)[self._filled_bytes : self._filled_bytes + len(some)] = some
            self._filled_bytes += len(some)
            taken += len(some)

    async def complete(self) -> None:
        if self._upload_id is None:
            with _faults("PutObject", self._key):
                await self._client.put_object(
                    **self._target, Body=self._filled() if self._filling else b"", ContentType="application/json"
                )
            self._done = True
            return
        await self._send()
        parts = await asyncio.gather(*self._parts)
        with _faults("CompleteMultipartUpload", self._key):
            await self._client.complete_multipart_upload(
                **self._target, UploadId=self._upload_id, MultipartUpload={"Parts": parts}
            )
        self._done = True

    async def abort(self) -> None:
        if self._done:
            return
        self._done = True
        for task in self._parts:
            task.cancel()
        await asyncio.gather(*self._parts, return_exceptions=True)
        self._filling = None
        self._spare.clear()
        if self._upload_id is not None:
            # What cannot be aborted now is an unfinished upload, which the clean-up takes by its age.
            with contextlib.suppress(ClientError, *NO_ANSWER):
                await self._client.abort_multipart_upload(**self._target, UploadId=self._upload_id)

    def _filled(self) -> Part:
        assert self._filling is not None, "a part is sent only when it is full, or the last one"
        return Part(memoryview(self._filling)[: self._filled_bytes])

    async def _send(self) -> None:
        if self._upload_id is None:
            with _faults("CreateMultipartUpload", self._key):
                answer = await self._client.create_multipart_upload(**self._target, ContentType="application/json")
            self._upload_id = answer["UploadId"]
        number = len(self._parts) + 1
        if number > UPLOAD_PARTS_MAX:
            raise ValueError(
                f"{self._key} has more than {UPLOAD_PARTS_MAX} parts of {UPLOAD_PART_BYTES} bytes: S3 takes no more"
            )
        await self._room.acquire()
        for task in self._parts:
            if task.done():
                task.result()  # a part that failed ends the upload at once
        assert self._filling is not None
        self._parts.append(asyncio.create_task(self._send_part(number, self._filled(), self._filling)))
        self._filling, self._filled_bytes = None, 0

    async def _send_part(self, number: int, part: Part, buffer: bytearray) -> dict[str, Any]:
        try:
            with _faults("UploadPart", self._key):
                answer = await self._client.upload_part(
                    **self._target, UploadId=self._upload_id, PartNumber=number, Body=part
                )
            # Only what was answered has left the socket's queue for certain, and may be written over.
            self._spare.append(buffer)
        finally:
            self._room.release()
        return {"PartNumber": number, "ETag": answer["ETag"]}


@contextlib.contextmanager
def _faults(operation: str, name: str) -> Any:
    try:
        yield
    except (ClientError, *NO_ANSWER) as error:
        raise _unavailable(operation, name, error) from error


def _etag_of(answer: dict[str, Any], operation: str, key: str) -> str:
    """Return an answer's ETag; without one nothing can be swapped, and some stores take an empty condition for none."""
    etag = answer.get("ETag", "")
    if not etag:
        raise StoreUnavailable(f"S3 {operation} of {key}: an answer without an ETag")
    return str(etag)


def _require_whole(page: dict[str, Any], prefix: str) -> None:
    """Raise StoreUnavailable for a page that is not what it tells of itself: botocore would take it for the last."""
    entries = len(page.get("Contents", ()))
    lost_its_way = page.get("IsTruncated") and not page.get("NextContinuationToken")
    if lost_its_way or page.get("KeyCount", entries) != entries:
        raise StoreUnavailable(f"S3 ListObjectsV2 of {prefix}: a page that is not whole, or names no next one")


def _unavailable(operation: str, name: str, error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"S3 {operation} of {name}: {error or type(error).__name__}")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
