"""An object store in memory, and the same store with calls that can break."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
from collections.abc import AsyncIterator, Callable

import msgspec

from shared.storage.object_store import (
    UPLOAD_PART_BYTES,
    AdminObjectStore,
    CasConflict,
    ObjectInfo,
    ObjectNotFound,
    ObjectStore,
    StoredObject,
    StoreUnavailable,
    UnfinishedUpload,
    Upload,
)
from tests.fakes.faults import ProcessLife, do_nothing

STREAM_CHUNK_BYTES = 7  # so that a record is cut anywhere


class BucketObject(msgspec.Struct, frozen=True):
    """An object as `MemoryStore` holds it."""

    body: bytes
    etag: str
    last_modified: dt.datetime


class MemoryStore:
    """An AdminObjectStore whose ETags are MD5 sums, so equal bytes have equal ETags, as in S3.

    An upload of more than ``part_bytes`` has several parts. Until it ends it is in ``unfinished``.
    """

    def __init__(self, clock: Callable[[], dt.datetime], *, part_bytes: int = UPLOAD_PART_BYTES) -> None:
        self._clock = clock
        self._part_bytes = part_bytes
        self._uploads = 0
        self.objects: dict[str, BucketObject] = {}
        self.unfinished: list[UnfinishedUpload] = []

    def bodies(self, prefix: str) -> dict[str, bytes]:
        """Return the objects under ``prefix``, by key."""
        return {key: self.objects[key].body for key in sorted(self.objects) if key.startswith(prefix)}

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        await asyncio.sleep(0)
        stored = self.objects.get(key)
        return None if stored is None else StoredObject(body=stored.body[:first_bytes], etag=stored.etag)

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        await asyncio.sleep(0)
        stored = self.objects.get(key)
        if (stored.etag if stored else None) != etag:
            raise CasConflict(key)
        return self.write(key, body)

    async def put(self, key: str, body: bytes) -> None:
        await asyncio.sleep(0)
        self.write(key, body)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        await asyncio.sleep(0)
        for key in sorted(self.objects):
            stored = self.objects.get(key)
            if stored is not None and key.startswith(prefix) and key > after:
                yield ObjectInfo(
                    key=key, etag=stored.etag, size_bytes=len(stored.body), last_modified=stored.last_modified
                )

    def upload(self, key: str) -> Upload:
        return _MemoryUpload(self, key, self._part_bytes)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        await asyncio.sleep(0)
        if key not in self.objects:
            raise ObjectNotFound(key)
        body = self.objects[key].body
        for begin in range(0, len(body), STREAM_CHUNK_BYTES):
            yield body[begin : begin + STREAM_CHUNK_BYTES]

    async def delete(self, key: str) -> None:
        await asyncio.sleep(0)
        self.objects.pop(key, None)

    async def now(self) -> dt.datetime:
        await asyncio.sleep(0)
        return self._clock()

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        await asyncio.sleep(0)
        for upload in list(self.unfinished):
            if upload.key.startswith(prefix):
                yield upload

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        await asyncio.sleep(0)
        self.unfinished = [upload for upload in self.unfinished if upload != unfinished]

    def write(self, key: str, body: bytes) -> str:
        """Write an object over any earlier one, and return its ETag."""
        etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        self.objects[key] = BucketObject(body, etag, self._clock())
        return etag

    def begin_upload(self, key: str) -> UnfinishedUpload:
        """Begin an upload of several parts."""
        self._uploads += 1
        begun = UnfinishedUpload(key=key, upload_id=f"upload-{self._uploads}", begun_at=self._clock())
        self.unfinished.append(begun)
        return begun


class _MemoryUpload:
    def __init__(self, store: MemoryStore, key: str, part_bytes: int) -> None:
        self._store = store
        self._key = key
        self._part_bytes = part_bytes
        self._body = bytearray()
        self._begun: UnfinishedUpload | None = None

    async def write(self, chunk: bytes) -> None:
        await asyncio.sleep(0)
        if self._begun is None and len(self._body) >= self._part_bytes:
            self._begun = self._store.begin_upload(self._key)
        self._body += chunk

    async def complete(self) -> None:
        await asyncio.sleep(0)
        if self._begun is not None:
            if self._begun not in self._store.unfinished:
                raise StoreUnavailable(f"the upload of {self._key} was refused: it has ended")
            self._store.unfinished.remove(self._begun)
        self._store.write(self._key, bytes(self._body))

    async def abort(self) -> None:
        await asyncio.sleep(0)
        self._body.clear()
        if self._begun in self._store.unfinished:
            self._store.unfinished.remove(self._begun)


class BreakableStore:
    """An ObjectStore whose calls are those of a `ProcessLife`."""

    def __init__(self, store: ObjectStore, life: ProcessLife) -> None:
        self._store = store
        self._life = life

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        return await self._life.make_call(
            f"get {key}", lambda: self._store.get(key, first_bytes=first_bytes), StoreUnavailable, effect=False
        )

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        return await self._life.make_call(
            f"swap {key}",
            lambda: self._store.compare_and_swap(key, body, etag=etag),
            StoreUnavailable,
            effect=True,
            loss=CasConflict,
        )

    async def put(self, key: str, body: bytes) -> None:
        await self._life.make_call(f"put {key}", lambda: self._store.put(key, body), StoreUnavailable, effect=True)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        async for listed in self._store.list(prefix, after=after):
            await self._life.make_call(f"list {prefix}", do_nothing, StoreUnavailable, effect=False)
            yield listed

    def upload(self, key: str) -> Upload:
        return _BreakableUpload(self._store.upload(key), key, self._life)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        async for chunk in self._store.stream(key):
            await self._life.make_call(f"stream {key}", do_nothing, StoreUnavailable, effect=False)
            yield chunk

    async def delete(self, key: str) -> None:
        await self._life.make_call(f"delete {key}", lambda: self._store.delete(key), StoreUnavailable, effect=True)


class BreakableAdminStore(BreakableStore):
    """An AdminObjectStore whose calls are those of a `ProcessLife`."""

    def __init__(self, store: AdminObjectStore, life: ProcessLife) -> None:
        super().__init__(store, life)
        self._operated = store
        self._operator = life

    async def now(self) -> dt.datetime:
        return await self._operator.make_call("now", self._operated.now, StoreUnavailable, effect=False)

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        async for upload in self._operated.unfinished_uploads(prefix):
            await self._operator.make_call(f"list uploads {prefix}", do_nothing, StoreUnavailable, effect=False)
            yield upload

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        await self._operator.make_call(
            f"abort upload {unfinished.key}",
            lambda: self._operated.abort_upload(unfinished),
            StoreUnavailable,
            effect=True,
        )


class _BreakableUpload:
    def __init__(self, upload: Upload, key: str, life: ProcessLife) -> None:
        self._upload = upload
        self._key = key
        self._life = life

    async def write(self, chunk: bytes) -> None:
        await self._life.make_call(
            f"write {self._key}", lambda: self._upload.write(chunk), StoreUnavailable, effect=False
        )

    async def complete(self) -> None:
        await self._life.make_call(f"complete {self._key}", self._upload.complete, StoreUnavailable, effect=True)

    async def abort(self) -> None:
        with contextlib.suppress(StoreUnavailable):  # the port says that giving up never fails
            await self._life.make_call(f"abort {self._key}", self._upload.abort, StoreUnavailable, effect=False)
