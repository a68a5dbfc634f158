"""What a request's record tells ingest: whether it was cancelled, so that what was not started is skipped."""

from __future__ import annotations

from shared.domain import keys
from shared.domain.ids import RequestId
from shared.domain.objects import RequestRecord
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

CANCELLED = "the request was cancelled"


class RequestCancelled(Exception):
    """Nobody wants this any more. The message says so."""


async def read_record(store: ObjectStore, request_id: RequestId) -> RequestRecord | None:
    """Return the record of a request, or None if there is none."""
    return await Repository(store).get(RequestRecord, keys.request(request_id))


async def read_cancelled(store: ObjectStore, request_id: RequestId) -> RequestRecord | None:
    """Return the record of a request that was cancelled, or None if it was not."""
    record = await read_record(store, request_id)
    return record if record is not None and record.cancelled_at is not None else None
