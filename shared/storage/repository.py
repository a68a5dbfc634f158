"""Typed objects of the bucket: read, compare-and-swap, update."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec

from shared.domain import bitmap, keys, objects
from shared.domain.ids import RequestId
from shared.domain.objects import BucketObject, Plan, RequestRecord
from shared.domain.requests import NOBODY, Caller, retried_record, with_action
from shared.runtime import metrics
from shared.storage.object_store import CasConflict, ObjectStore, StoreUnavailable

TRIES_MAX = 10
"""A write that has conflicted so often, within some five seconds, fails as in an outage. Its caller retries later."""
WAIT_FIRST_S = 0.02
"""The longest wait before the third try. The second one follows at once: most conflicts are with one other writer."""

_Stored = TypeVar("_Stored", bound=BucketObject)


class Versioned(msgspec.Struct, Generic[_Stored], frozen=True):
    """An object with the ETag under which it was read."""

    value: _Stored
    etag: str


class Repository:
    """Reads and writes typed objects. Reads raise CorruptObject and NewerObject, as `objects.decode` does."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def read(self, kind: type[_Stored], key: str) -> Versioned[_Stored] | None:
        """Return an object of ``kind`` with its ETag, or None if there is none."""
        found = await self._store.get(key)
        return None if found is None else Versioned(objects.decode(kind, found.body, key), found.etag)

    async def get(self, kind: type[_Stored], key: str) -> _Stored | None:
        """Return an object of ``kind``, or None if there is none."""
        found = await self._store.get(key)
        return None if found is None else objects.decode(kind, found.body, key)

    async def compare_and_swap(self, key: str, value: BucketObject, *, over: Versioned[_Stored] | None) -> str:
        """Write an object if the stored version is still ``over`` (None: none exists); return the new ETag.

        Raises CasConflict otherwise.
        """
        return await self._store.compare_and_swap(key, objects.encode(value), etag=over.etag if over else None)

    async def create_if_absent(self, key: str, value: _Stored) -> _Stored:
        """Write an object if there is none; return the stored one.

        A conditional write can fail although no other writer exists, when the store did not decide an earlier conflict
        in time. Then there is no object to read, and the write is tried again. Raises StoreUnavailable after TRIES_MAX.
        """
        tries = 0
        while True:
            await _before_try(tries, key)
            tries += 1
            try:
                await self.compare_and_swap(key, value, over=None)
            except CasConflict:
                stored = await self.get(type(value), key)
                if stored is not None:
                    return stored
            else:
                return value

    async def update(
        self,
        kind: type[_Stored],
        key: str,
        change: Callable[[_Stored | None], Awaitable[_Stored | None]],
        *,
        counted_as: str = "",
    ) -> _Stored | None:
        """Change an object by compare-and-swap, again after each conflict; return the stored object.

        ``change`` gets the stored object, or None, and returns the new one. It returns its argument, or None, to change
        nothing. Raises StoreUnavailable after TRIES_MAX conflicts. A metric counts each under ``counted_as``.
        """
        tries = 0
        while True:
            await _before_try(tries, key)
            tries += 1
            before = await self.read(kind, key)
            after = await change(before.value if before else None)
            if after is None or (before is not None and after is before.value):
                return before.value if before else None
            try:
                await self.compare_and_swap(key, after, over=before)
            except CasConflict:
                if counted_as:
                    metrics.cas_conflicts.labels(counted_as).inc()
                continue
            return after


async def _before_try(tries: int, key: str) -> None:
    """Wait ever longer after ``tries`` conflicts. Raises StoreUnavailable after the last one."""
    if tries == TRIES_MAX:
        raise StoreUnavailable(f"{key}: each of {TRIES_MAX} conditional writes conflicted with another one")
    if tries > 1:
        await asyncio.sleep(random.uniform(0, WAIT_FIRST_S * 2 ** (tries - 2)))  # noqa: S311  # jitter, not a secret


async def read_plan(store: ObjectStore, date: dt.date) -> Plan | None:
    """Return the plan of a date, or None if the date was never requested."""
    return await Repository(store).get(Plan, keys.plan(date))


async def read_request_record(store: ObjectStore, request_id: RequestId) -> RequestRecord | None:
    """Return the record of a request, or None if there is none."""
    return await Repository(store).get(RequestRecord, keys.request(request_id))


async def read_cancelled_record(store: ObjectStore, request_id: RequestId) -> RequestRecord | None:
    """Return the record of a cancelled request, or None if the request was not cancelled."""
    record = await read_request_record(store, request_id)
    return record if record is not None and record.cancelled_at is not None else None


async def begin_retry(
    store: ObjectStore,
    request_id: RequestId,
    now: dt.datetime,
    *,
    positions: int | None = None,
    by: Caller = NOBODY,
) -> RequestRecord | None:
    """Record a retry of a request's failed cities, and return the record. The caller publishes its ``request_event``.

    A retry that already runs is returned unchanged, to be published again. Returns None if there is no such request.
    Raises NothingToRetry.
    """

    async def retried(record: RequestRecord | None) -> RequestRecord | None:
        after = record and retried_record(record, now, positions=positions)
        if after is None or after is record or after.retry is None or by is NOBODY:
            return after
        cities = bitmap.size(after.retry.positions)
        result = "all cities" if not cities else "1 city" if cities == 1 else f"{cities} cities"
        return with_action(after, by, "retry", result=result, at=now)

    return await Repository(store).update(RequestRecord, keys.request(request_id), retried, counted_as="request")
