"""The S3 adapter: obstore reads, writes, lists and uploads; aioboto3 serves administration.

obstore works outside the interpreter lock and needs a fraction of botocore's memory and processor time. It cannot
create buckets, list unfinished uploads or read the store's clock. `shared.storage.s3_administration` does that with
aioboto3, and is imported on first use.

The callers of this module retry. This module sends a conditional write once, because a repeated one would conflict with
itself. It retries reads and the parts of an upload a few times, so that one 503 does not restart a large download.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store as Obstore

from shared.runtime import metrics, tracing
from shared.runtime.settings import Settings
from shared.storage.conditional_writes import ConditionalWrites
from shared.storage.object_store import (
    STREAM_CHUNK_BYTES,
    UPLOAD_PART_BYTES,
    CasConflict,
    ObjectInfo,
    ObjectNotFound,
    StoredObject,
    StoreUnavailable,
    UnfinishedUpload,
    Upload,
)
from shared.storage.s3_credentials import SharedFileCredentials, uses_shared_files

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

    from shared.storage.s3_administration import S3Administration

UPLOAD_PARTS_IN_FLIGHT_MAX: Final = 2
UPLOAD_PARTS_MAX: Final = 10_000
WRITE_BYTES: Final = 1024 * 1024
LIST_PAGE_KEYS: Final = 1_000
CREDENTIALS_INTERVAL_S: Final = 2.0
THREADS_RETURN_S: Final = 0.02
CONFLICT_WAITS_S: Final = (0.05, 0.2, 0.8, None)

NO_RETRIES: Final[RetryConfig] = {"max_retries": 0}
FEW_RETRIES: Final[RetryConfig] = {
    "max_retries": 2,
    "retry_timeout": dt.timedelta(minutes=1),
    "backoff": {"init_backoff": dt.timedelta(milliseconds=100), "max_backoff": dt.timedelta(seconds=2)},
}

# By default obstore starts one thread for each core. Threads that wake each other up for small requests cost more
# processor time than they save. This must be set before the first request.
os.environ.setdefault("TOKIO_WORKER_THREADS", "1")

_JSON: Final = {"Content-Type": "application/json"}
_PARQUET: Final = {"Content-Type": "application/vnd.apache.parquet"}
_FAULTS: Final = (BaseError, OSError)
_STATUS: Final = re.compile(r"status code: (\d{3})")
CONNECTIONS_MAX: Final = 32
_REASON: Final = re.compile(r'(?:message|error): "([^"]+)"|(InvalidCertificate)')
_NO_SUCH_KEY: Final = "<Code>NoSuchKey</Code>"
_INSTANCE_ROLE: Final = "/latest/api/token"  # obstore requests it where it finds no other credentials


class S3Store:
    """An AdminObjectStore in an S3 bucket. Use it as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.bucket = settings.s3_bucket
        self._connections = asyncio.Semaphore(CONNECTIONS_MAX)
        self._admin: S3Administration | None = None
        self._closing = contextlib.AsyncExitStack()
        name = f"the bucket {self.bucket} at {endpoint_url_of(settings) or 'AWS'}"
        self._conditional_writes = ConditionalWrites(name, lambda *write: self._swap(self._client, *write))
        self._open()

    def _open(self) -> None:
        """Create the clients, which look up the credentials. Running requests keep the old clients."""
        self._opened_at_s = time.monotonic()
        self._once = _client(self._settings, NO_RETRIES)
        self._client = _client(self._settings, FEW_RETRIES)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._closing.aclose()
        # A thread of obstore that returns from Python while the interpreter shuts down would abort the process.
        await asyncio.sleep(THREADS_RETURN_S)

    async def check(self) -> None:
        """Raise StoreUnavailable if the bucket cannot be written, UnsafeStore if it ignores conditions of writes."""
        while not await self.check_next():
            pass

    async def check_next(self) -> bool:
        """Make the next request of `check`. Return whether the check is complete; then it begins with its last request.

        Refused credentials are looked up again, because an operator may have corrected the file or the role.
        """
        try:
            return await self._conditional_writes.check_next()
        except StoreUnavailable as error:
            refused = isinstance(error.__cause__, _FAULTS) and _status(error.__cause__) in {None, 400, 401, 403}
            if refused and time.monotonic() - self._opened_at_s >= CREDENTIALS_INTERVAL_S:
                self._open()
            raise

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        if first_bytes == 0 and (etag := await self._head(key)) is not None:
            return StoredObject(body=b"", etag=etag)
        try:
            async with self._connections:
                with _observed("GetObject", key):
                    if first_bytes is None:
                        response = await obstore.get_async(self._client, key)
                    else:
                        response = await obstore.get_async(self._client, key, options={"range": (0, first_bytes or 1)})
                    body = await response.bytes_async()
        except _FAULTS as error:
            if _result_of(error) == "not_found":
                return None
            raise _unavailable("GetObject", key, error) from error
        return StoredObject(body=bytes(body), etag=_etag_of(response.meta["e_tag"], "GetObject", key))

    async def _head(self, key: str) -> str | None:
        """Return the ETag of an object. None if there is none, or no bucket: the 404 of a HEAD does not say which."""
        try:
            async with self._connections:
                with _observed("HeadObject", key):
                    try:
                        meta = await obstore.head_async(self._client, key)
                    except FileNotFoundError:
                        return None
        except _FAULTS as error:
            raise _unavailable("HeadObject", key, error) from error
        return _etag_of(meta["e_tag"], "HeadObject", key)

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        await self._conditional_writes.require()
        return await self._swap(self._once, key, body, etag)

    async def _swap(self, client: Obstore, key: str, body: bytes, etag: str | None) -> str:
        for wait_s in CONFLICT_WAITS_S:
            try:
                async with self._connections:
                    with _observed("PutObject", key):
                        written = await obstore.put_async(
                            client,
                            key,
                            body,
                            mode="create" if etag is None else {"e_tag": etag},
                            use_multipart=False,
                            attributes=_PARQUET if key.endswith(".parquet") else _JSON,
                        )
            except _FAULTS as error:
                if _result_of(error) != "conflict":
                    raise _unavailable("PutObject", key, error) from error
                # 409: the store has not yet decided between this write and a concurrent one.
                if _status(error) != 409 or wait_s is None:
                    raise CasConflict(key) from error
                await asyncio.sleep(wait_s)
            else:
                return _etag_of(written["e_tag"], "PutObject", key)
        raise AssertionError("the last try neither returned nor raised")

    async def put(self, key: str, body: bytes) -> None:
        with _faults("PutObject", key):
            async with self._connections:
                with _observed("PutObject", key):
                    await obstore.put_async(self._client, key, body, use_multipart=False, attributes=_JSON)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        # obstore accepts only whole folders as prefixes. Keys with a partial name are adjacent; they are selected here.
        folder = prefix[: prefix.rfind("/") + 1]
        offset = max(after, "" if prefix == folder else prefix[:-1])
        # obstore treats a truncated page without a continuation token as the last one. So the listing is asked for more
        # after its last key, until there is none: an incomplete one could delete objects or activate an incomplete
        # generation. Keys that others write meanwhile may be among them.
        asked_after, is_continued = offset, False
        while True:
            last = ""
            async for entry in self._entries(folder, asked_after):
                last = entry.key
                if is_continued and last <= asked_after:
                    raise StoreUnavailable(f"S3 ListObjectsV2 of {prefix}: {last} is listed after {asked_after}")
                if last.startswith(prefix):
                    yield entry
                elif last > prefix:
                    return
            if not last:
                return
            asked_after, is_continued = last, True

    async def _entries(self, folder: str, offset: str) -> AsyncIterator[ObjectInfo]:
        listing = obstore.list(self._client, folder or None, offset=offset or None, chunk_size=LIST_PAGE_KEYS)
        with _faults("ListObjectsV2", folder):
            while True:
                with _observed("ListObjectsV2", folder):
                    try:
                        page = await anext(listing)  # with a default it raises SystemError over obstore
                    except StopAsyncIteration:
                        return
                for entry in page:
                    yield ObjectInfo(
                        key=entry["path"],
                        etag=_etag_of(entry["e_tag"], "ListObjectsV2", entry["path"]),
                        size_bytes=entry["size"],
                        last_modified=entry["last_modified"],
                    )
                if len(page) < LIST_PAGE_KEYS:
                    return

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        try:
            with _observed("GetObject", key):
                response = await obstore.get_async(self._client, key)
        except _FAULTS as error:
            if _result_of(error) == "not_found":
                raise ObjectNotFound(key) from error
            raise _unavailable("GetObject", key, error) from error
        with _faults("GetObject", key):
            async for chunk in response.stream(min_chunk_size=STREAM_CHUNK_BYTES):
                yield bytes(chunk)

    async def delete(self, key: str) -> None:
        try:
            async with self._connections:
                with _observed("DeleteObject", key):
                    await obstore.delete_async(self._client, key)
        except _FAULTS as error:
            if _result_of(error) == "not_found":
                return
            raise _unavailable("DeleteObject", key, error) from error

    def upload(self, key: str) -> Upload:
        return _S3Upload(self._client, key)

    async def create_bucket(self) -> bool:
        """Create the bucket if it does not exist. Return whether it was created."""
        return await (await self._administration()).create_bucket()

    async def now(self) -> dt.datetime:
        return await (await self._administration()).now()

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        async for unfinished in (await self._administration()).unfinished_uploads(prefix):
            yield unfinished

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        await (await self._administration()).abort_upload(unfinished)

    async def _administration(self) -> S3Administration:
        if self._admin is None:
            from shared.storage.s3_administration import S3Administration  # noqa: PLC0415  # botocore takes 30 MB

            self._admin = await self._closing.enter_async_context(S3Administration(self._settings))
        return self._admin


class _S3Upload:
    """One PutObject for an object shorter than a part, else a multipart upload with few parts in flight."""

    def __init__(self, client: Obstore, key: str) -> None:
        self._key = key
        self._writer = obstore.open_writer_async(
            client,
            key,
            buffer_size=UPLOAD_PART_BYTES,
            max_concurrency=UPLOAD_PARTS_IN_FLIGHT_MAX,
            attributes=_JSON,
        )
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self._written_bytes = 0
        self._completing: asyncio.Future[None] | None = None
        self._aborted = False

    async def write(self, chunk: bytes) -> None:
        self._buffer.append(chunk)
        self._buffered_bytes += len(chunk)
        if self._buffered_bytes >= WRITE_BYTES:  # one call costs as much as copying about 100 kB
            await self._write_buffer()

    async def _write_buffer(self) -> None:
        piece = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        self._buffer.clear()
        self._buffered_bytes = 0
        self._written_bytes += len(piece)
        if self._written_bytes > UPLOAD_PARTS_MAX * UPLOAD_PART_BYTES:
            raise ValueError(
                f"{self._key} has more than {UPLOAD_PARTS_MAX} parts of {UPLOAD_PART_BYTES} bytes, the limit of S3"
            )
        with _faults("UploadPart", self._key), _observed("UploadPart"):
            await self._writer.write(piece)

    async def complete(self) -> None:
        if self._buffer:
            await self._write_buffer()
        # A failed close aborts the upload, but a cancelled one does not. The shield lets the close always finish.
        self._completing = asyncio.ensure_future(self._writer.close())
        with _faults("CompleteMultipartUpload", self._key), _observed("CompleteMultipartUpload", self._key):
            await asyncio.shield(self._completing)

    async def abort(self) -> None:
        # An upload that cannot be aborted now stays unfinished; gc aborts it later by its age.
        with contextlib.suppress(*_FAULTS):
            if self._completing is not None:
                await self._completing
            elif not self._aborted:
                self._aborted = True
                self._buffer.clear()
                await self._writer.__aexit__(RuntimeError, RuntimeError("the upload is aborted"), None)


def endpoint_url_of(settings: Settings, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the URL of the S3 server, or None for AWS."""
    given = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    return settings.s3_endpoint_url or given or None


def ca_file_of(settings: Settings, environment: Mapping[str, str] = os.environ) -> str:
    """Return the file of certificates to trust in addition to the system's, or an empty string."""
    return settings.s3_ca_file or environment.get("AWS_CA_BUNDLE", "")


def _client(settings: Settings, retries: RetryConfig) -> Obstore:
    """Return a client of the bucket. It reads its credentials and the proxy from the environment."""
    options: ClientConfig = {
        "allow_http": True,
        "connect_timeout": "5s",
        "read_timeout": "30s",  # a store can delay concurrent writers of one key for seconds
        "timeout": "1d",  # of a whole request: a stream may take hours, and its reader has its own deadline
        "pool_idle_timeout": "15s",
        "pool_max_idle_per_host": str(CONNECTIONS_MAX),
    }
    ca_file = ca_file_of(settings)
    if ca_file:
        options["root_certificate"] = _read_certificates(ca_file)
    config: dict[str, Any] = {"region": settings.s3_region, "disable_bulk_delete": True}
    endpoint_url = endpoint_url_of(settings)
    virtual = settings.s3_addressing_style == "virtual" or (
        settings.s3_addressing_style == "auto" and endpoint_url is None
    )
    config["virtual_hosted_style_request"] = virtual
    if endpoint_url is not None:
        url = urlsplit(endpoint_url)
        hosted = f"{url.scheme}://{settings.s3_bucket}.{url.netloc}{url.path}".rstrip("/")
        config["endpoint"] = hosted if virtual else endpoint_url.rstrip("/")
    if settings.s3_checksums == "when_supported":
        config["checksum_algorithm"] = "SHA256"
    metadata_url = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")  # obstore uses another name
    if metadata_url:
        config["metadata_endpoint"] = metadata_url
    if uses_shared_files(os.environ):
        config["credential_provider"] = SharedFileCredentials()
    return Obstore(settings.s3_bucket, client_options=options, retry_config=retries, **config)


def _read_certificates(ca_file: str) -> bytes:
    try:
        return Path(ca_file).read_bytes()
    except OSError as error:
        raise StoreUnavailable(f"the certificates for S3 in {ca_file} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _observed(operation: metrics.S3Operation, key: str | None = None) -> Iterator[None]:
    """Observe the time and the result of one request, and trace it if it has a ``key``."""
    name = f"S3 {operation}"
    attributes = {"rpc.system": "aws-api", "rpc.method": operation, "aws.s3.key": key or ""}
    began_s = time.perf_counter()
    result: metrics.S3Result = "cancelled"
    span = tracing.inner_span(name, "client", attributes, errors=False) if key else contextlib.nullcontext()
    with span:
        try:
            yield
            result = "ok"
        except _FAULTS as error:
            result = _result_of(error)
            raise
        finally:
            metrics.s3_request_seconds.labels(operation, result).observe(time.perf_counter() - began_s)
            if key:
                tracing.describe_span({"tripfold.s3.result": result}, failed=result == "error")


def _result_of(error: Exception) -> Literal["not_found", "conflict", "error"]:
    """Return what an error of obstore means. A missing bucket must not look like a missing object."""
    if isinstance(error, FileNotFoundError) and _NO_SUCH_KEY in str(error):
        return "not_found"
    if isinstance(error, (AlreadyExistsError, PreconditionError)):
        bucket_missing = _status(error) == 404 and _NO_SUCH_KEY not in str(error)
        return "error" if bucket_missing else "conflict"
    return "error"


@contextlib.contextmanager
def _faults(operation: str, name: str) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise _unavailable(operation, name, error) from error


def _unavailable(operation: str, name: str, error: Exception) -> StoreUnavailable:
    message, _, details = str(error).partition("\n\nDebug source")
    reasons = _REASON.findall(details) if message.endswith("error sending request") else []
    message = f"{message}: {''.join(reasons[-1])}" if reasons else message or type(error).__name__
    if _INSTANCE_ROLE in message:
        message = f"no AWS credentials in the environment or shared files, and no instance role ({message})"
    return StoreUnavailable(f"S3 {operation} of {name}: {message}")


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error. obstore has it only in the message."""
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def _etag_of(etag: str | None, operation: str, key: str) -> str:
    """Return ``etag``. Raise if it is missing: some stores treat a write with an empty condition as unconditional."""
    if not etag:
        raise StoreUnavailable(f"S3 {operation} of {key}: the response has no ETag")
    return etag
