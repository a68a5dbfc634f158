"""Notes on which attempts at a city-day are being parsed: how a file is found out that kills whoever parses it.

An attempt is noted before its parsing starts, and takes itself out when the parsing ends, in whatever way: with a
result, with a fault of the upstream or of the bucket, or because the worker was asked to stop. So an attempt that stays
in the note has died, or is at work in another process, or could not reach the bucket at its end. The three cannot be
told apart. From ALONE_AFTER of them on, the file is parsed while its worker parses nothing else, so that no neighbour
can be the cause. After ALONE_DEATHS_MAX deaths alone the file is quarantined without being parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import Callable

import msgspec
import structlog

from shared.domain import keys, objects
from shared.domain.ids import CityId
from shared.domain.objects import AttemptsUnderWay, AttemptUnderWay
from shared.runtime import metrics
from shared.storage.object_store import CasConflict, ObjectStore, StoreUnavailable

ALONE_AFTER = 2
ALONE_DEATHS_MAX = 3
NOTED_MAX = 10
END_DEADLINE_S = 5.0

_log = structlog.get_logger()


class Deaths(msgspec.Struct, frozen=True, kw_only=True):
    """How many attempts at a file have not taken themselves out, and how many of them were alone in their worker."""

    all: int
    alone: int


class Attempts:
    """The notes of all city-days."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._clock = clock

    async def begin(self, date: dt.date, city_id: CityId, attempt: str, *, alone: bool) -> Deaths:
        """Note that an attempt is about to be parsed; return how many before it have not taken themselves out."""
        key = keys.attempts(date, city_id)
        own = AttemptUnderWay(attempt=attempt, begun_at=self._clock(), alone=alone)
        note = AttemptsUnderWay(date=date, city_id=city_id)
        etag = None
        while True:
            others = tuple(one for one in note.under_way if one.attempt != attempt)
            # Of more than are counted, the latest are kept.
            noted = AttemptsUnderWay(date=date, city_id=city_id, under_way=(*others, own)[-NOTED_MAX:])
            try:
                await self._store.compare_and_swap(key, objects.encode(noted), etag=etag)
            except CasConflict:
                metrics.cas_conflicts.labels("attempts").inc()
                found = await self._store.get(key)
                note = (
                    objects.decode(AttemptsUnderWay, found.body, key)
                    if found
                    else AttemptsUnderWay(date=date, city_id=city_id)
                )
                etag = found.etag if found else None
            else:
                return Deaths(all=len(others), alone=sum(one.alone for one in others))

    async def end(self, date: dt.date, city_id: CityId, attempt: str, *, settled: bool) -> None:
        """Take an attempt out; if what it found settles the matter, all others too. Raises nothing of the bucket's.

        What cannot be written now is taken for a death later on.
        """
        try:
            async with asyncio.timeout(END_DEADLINE_S):
                await self._end(keys.attempts(date, city_id), attempt, settled=settled)
        except (StoreUnavailable, TimeoutError) as error:
            _log.warning("an attempt stays noted", date=str(date), city_id=city_id, attempt=attempt, error=str(error))

    async def _end(self, key: str, attempt: str, *, settled: bool) -> None:
        while not settled:
            found = await self._store.get(key)
            if found is None:
                return
            note = objects.decode(AttemptsUnderWay, found.body, key)
            others = tuple(one for one in note.under_way if one.attempt != attempt)
            if not others:
                break
            left = AttemptsUnderWay(date=note.date, city_id=note.city_id, under_way=others)
            with contextlib.suppress(CasConflict):
                await self._store.compare_and_swap(key, objects.encode(left), etag=found.etag)
                return
        await self._store.delete(key)
