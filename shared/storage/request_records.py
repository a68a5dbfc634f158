"""Records of requests in the bucket: changes that more than one program makes."""

from __future__ import annotations

import datetime as dt

from shared.domain import keys
from shared.domain.ids import RequestId
from shared.domain.objects import RequestRecord
from shared.domain.requests import retried_record
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository


async def begin_retry(
    store: ObjectStore, request_id: RequestId, now: dt.datetime, *, positions: int | None = None
) -> RequestRecord | None:
    """Record a retry of a request's failed cities; return the record, whose ``request_event`` is to be published.

    A retry that runs already is returned as it is, to be published again. Returns None if there is no such request.
    Raises NothingToRetry.
    """

    async def retried(record: RequestRecord | None) -> RequestRecord | None:
        return record and retried_record(record, now, positions=positions)

    return await Repository(store).update(RequestRecord, keys.request(request_id), retried, counted_as="request")
