"""Records which attempts are parsing a city-day, to detect a file that crashes its workers.

A worker records an attempt before it parses the file, and removes it when the parsing ends. The end may be a result, an
error of the upstream or the bucket, or a shutdown. An attempt that stays recorded has crashed, still runs in another
process, or could not reach the bucket at its end. A worker cannot distinguish these cases.

From ALONE_AFTER such attempts on, a worker parses the file while it parses nothing else, so no other file can cause
the crash. After ALONE_CRASHES_MAX crashes alone, a worker quarantines the file without parsing it.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable

import msgspec
import structlog

from shared.domain import keys
from shared.domain.ids import CityId
from shared.domain.objects import AttemptsUnderWay, AttemptUnderWay
from shared.runtime import metrics
from shared.storage.object_store import CasConflict, ObjectStore, StoreUnavailable
from shared.storage.repository import Repository, Versioned

ALONE_AFTER = 2
ALONE_CRASHES_MAX = 3
NOTED_MAX = 10
END_DEADLINE_S = 5.0

_log = structlog.get_logger()


class CrashedAttempts(msgspec.Struct, frozen=True, kw_only=True):
    """The number of attempts that stayed recorded, and how many of them were alone in their worker."""

    all: int
    alone: int


class Attempts:
    """The recorded attempts of all city-days."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._repository = Repository(store)
        self._clock = clock

    async def begin(self, date: dt.date, city_id: CityId, attempt: str, *, alone: bool) -> CrashedAttempts:
        """Record an attempt before it is parsed, and return the earlier attempts that stayed recorded."""
        key = keys.attempts(date, city_id)
        own = AttemptUnderWay(attempt=attempt, begun_at=self._clock(), alone=alone)
        before: Versioned[AttemptsUnderWay] | None = None
        while True:
            under_way = before.value.under_way if before else ()
            others = tuple(one for one in under_way if one.attempt != attempt)
            # Only the latest attempts are kept.
            noted = AttemptsUnderWay(date=date, city_id=city_id, under_way=(*others, own)[-NOTED_MAX:])
            try:
                # Most city-days have no attempts recorded, so the first try writes without a read.
                await self._repository.compare_and_swap(key, noted, over=before)
            except CasConflict:
                metrics.cas_conflicts.labels("attempts").inc()
                before = await self._repository.read(AttemptsUnderWay, key)
            else:
                return CrashedAttempts(all=len(others), alone=sum(one.alone for one in others))

    async def end(self, date: dt.date, city_id: CityId, attempt: str, *, settled: bool) -> None:
        """Remove an attempt, or all attempts if this one settled whether the file is valid.

        Raises no error of the bucket. An attempt that cannot be removed now counts as a crash later.
        """
        try:
            async with asyncio.timeout(END_DEADLINE_S):
                await self._end(keys.attempts(date, city_id), attempt, settled=settled)
        except (StoreUnavailable, TimeoutError) as error:
            _log.warning("attempt_not_removed", date=str(date), city_id=city_id, attempt=attempt, error=str(error))

    async def _end(self, key: str, attempt: str, *, settled: bool) -> None:
        while not settled:
            before = await self._repository.read(AttemptsUnderWay, key)
            if before is None:
                return
            others = tuple(one for one in before.value.under_way if one.attempt != attempt)
            if not others:
                break
            left = AttemptsUnderWay(date=before.value.date, city_id=before.value.city_id, under_way=others)
            try:
                await self._repository.compare_and_swap(key, left, over=before)
            except CasConflict:
                continue
            return
        await self._store.delete(key)
