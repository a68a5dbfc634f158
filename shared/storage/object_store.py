"""The bucket: the port that the services use. `shared.storage.s3` adapts it to S3.

Two facts about S3 shape this port. A compare-and-swap is a PutObject with ``If-Match`` or ``If-None-Match``, used on
small objects only: racing conditional multipart uploads are not exact on every store. And a response can be lost: a
write that failed may have happened, so a writer that loses a race reads the object again before it decides.
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
    """The store cannot be used now: unreachable, throttling, refusing the credentials. Wait, then try again."""


class CasConflict(RuntimeError):
    """Somebody else wrote the object first, or an earlier try of ours did: read it again.

    There may be nothing to read: a store can answer for as long as one asks that a conflict is not decided yet.
    """


class StoredObject(msgspec.Struct, frozen=True, kw_only=True):
    """An object as it was read: its bytes, and the ETag that a swap has to name."""

    body: bytes
    etag: str


class ObjectInfo(msgspec.Struct, frozen=True, kw_only=True):
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

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        """Read an object, or its first bytes, or return None if there is none."""

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        """Write an object only if its ETag still is ``etag`` (None: only if there is none); return the new ETag.

        Raises CasConflict if it is not so.
        """

    async def put(self, key: str, body: bytes) -> None:
        """Write an object whose key nobody else writes."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """List the objects under ``prefix``, page by page, in the store's order.

        With ``after``, only those whose key is past it.
        """

    def upload(self, key: str) -> Upload:
        """Begin a new object of unknown size, whose key nobody else writes."""

    async def delete(self, key: str) -> None:
        """Delete an object; it is no fault if there is none."""


class ObjectNotFound(RuntimeError):
    """There is no object under the key."""


class UnfinishedUpload(msgspec.Struct, frozen=True, kw_only=True):
    """A multipart upload that was begun, and neither completed nor aborted."""

    key: str
    upload_id: str
    begun_at: dt.datetime


class AdminObjectStore(ObjectStore, Protocol):
    """What an operator's commands need of a bucket beyond the services."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """Read an object of any size, chunk by chunk. Raises ObjectNotFound if there is none."""

    async def now(self) -> dt.datetime:
        """Return the time by the store's own clock, which ``last_modified`` and ``begun_at`` are of too."""

    def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        """List the multipart uploads under ``prefix`` that were begun and not ended."""

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        """Give up an upload that whoever began it has left behind; it is no fault if it has ended since."""
