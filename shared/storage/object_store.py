"""The object store port. `shared.storage.s3` is its adapter for S3.

Two properties of S3 shape this port. First, a compare-and-swap is a PutObject with ``If-Match`` or ``If-None-Match``.
It is used only for small objects, because conditional multipart uploads are not exact on every store. Second, a
response can be lost: a failed write may be stored. After a conflict, a writer therefore reads the object again before
it decides.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from shared.runtime.retry import DependencyUnavailable

UPLOAD_PART_BYTES = 5 * 1024 * 1024
STREAM_CHUNK_BYTES = 1024 * 1024


class StoreUnavailable(DependencyUnavailable):
    """The store is unreachable, throttles requests or refuses the credentials. Retry later."""


class CasConflict(RuntimeError):
    """The object has another ETag: another writer wrote it, or an own write whose response was lost. Read it again.

    A conditional write can fail although no other writer exists: a store can return 409 until it has decided.
    """


class ObjectNotFound(RuntimeError):
    """There is no object with this key."""


class StoredObject(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes and the ETag of an object that was read."""

    body: bytes
    etag: str


class ObjectInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of a listing."""

    key: str
    etag: str
    size_bytes: int
    last_modified: dt.datetime


class Upload(Protocol):
    """A streaming upload of a new object. The object is not visible before ``complete``."""

    async def write(self, chunk: bytes) -> None:
        """Append ``chunk``. Waits while too many parts are in flight."""

    async def complete(self) -> None:
        """Make the whole object visible."""

    async def abort(self) -> None:
        """Abort the upload and delete its parts. Safe to call at any time, also after ``complete``."""


class ObjectStore(Protocol):
    """A bucket. Every method raises StoreUnavailable when the store cannot be used."""

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        """Return an object, or only its first bytes (0: only its ETag), or None if there is none."""

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        """Write an object only if its ETag is still ``etag`` (None: if it does not exist); return the new ETag.

        Raises CasConflict otherwise.
        """

    async def put(self, key: str, body: bytes) -> None:
        """Write an object. No other writer may use its key."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """List the objects under ``prefix`` page by page, in the order of the store.

        Only keys after ``after`` are listed, if it is given.
        """

    def upload(self, key: str) -> Upload:
        """Start the upload of an object of unknown size. No other writer may use its key."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """Read an object of any size in chunks. Raises ObjectNotFound if there is none."""

    async def delete(self, key: str) -> None:
        """Delete an object. Succeeds if there is none."""


class UnfinishedUpload(msgspec.Struct, frozen=True, kw_only=True):
    """A multipart upload that is neither completed nor aborted."""

    key: str
    upload_id: str
    begun_at: dt.datetime


class AdminObjectStore(ObjectStore, Protocol):
    """A bucket with the further methods that operator commands need."""

    async def now(self) -> dt.datetime:
        """Return the time of the store's clock, which also sets ``last_modified`` and ``begun_at``."""

    def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        """List the unfinished multipart uploads under ``prefix``."""

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        """Abort an abandoned upload. Succeeds if it has ended since."""
