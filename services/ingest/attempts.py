"""Notes on which attempts at a city-day are being parsed: how a file is found out that kills whoever parses it.

An attempt is noted before its parsing starts, and takes itself out when the parsing ends, in whatever way: with a
result, with a fault of the upstream or of the bucket, or because the worker was asked to stop. So what stands in the
note has died, or is at work in another process, or could not reach the bucket at its end. The three cannot be told
apart, and need not be: from APART_AFTER of them on, the file is parsed in a process of its own, where a good file comes
out as anywhere else, and a deadly one kills that process alone. Only after DEATHS_MAX of them is the city-day given up:
then the file does its harm before it is parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import Callable

import structlog

from shared import health, keys, objects
from shared.identity import CityId
from shared.objects import AttemptsUnderWay, AttemptUnderWay
from shared.store import LostRace, ObjectStore, StoreUnavailable

APART_AFTER = 2
DEATHS_MAX = 10
END_DEADLINE_S = 5.0

_log = structlog.get_logger()


class Attempts:
    """The notes of all city-days."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._clock = clock

    async def begin(self, date: dt.date, city_id: CityId, attempt: str) -> int:
        """Note that an attempt is about to be parsed; return how many before it have not taken themselves out."""
        key = keys.attempts(date, city_id)
        own = AttemptUnderWay(attempt=attempt, begun_at=self._clock())
        note = AttemptsUnderWay(date=date, city_id=city_id)
        etag = None
        while True:
            others = tuple(one for one in note.under_way if one.attempt != attempt)
            # Of more than are counted, the latest are kept.
            noted = AttemptsUnderWay(date=date, city_id=city_id, under_way=(*others, own)[-DEATHS_MAX - 1 :])
            try:
                await self._store.swap(key, objects.encode(noted), etag=etag)
            except LostRace:
                health.lost_races.labels("attempts").inc()
                found = await self._store.get(key)
                note = (
                    objects.decode(AttemptsUnderWay, found.body, key)
                    if found
                    else AttemptsUnderWay(date=date, city_id=city_id)
                )
                etag = found.etag if found else None
            else:
                return len(others)

    async def end(self, date: dt.date, city_id: CityId, attempt: str, *, settled: bool) -> None:
        """Take an attempt out; if what it found settles the matter, all others too. Raises nothing of the bucket's.

        What cannot be written now is taken for a death later on, which costs a process of its own and nothing else.
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
            with contextlib.suppress(LostRace):
                await self._store.swap(key, objects.encode(left), etag=found.etag)
                return
        await self._store.delete(key)
