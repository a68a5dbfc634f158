"""Notes which files a process parses, so that a file that crashes one process is found by the next.

A worker writes the note of a city-day before it parses the file, and removes it when its attempt has ended, however it
ended. So a note of another process says that the file may have crashed that process. It proves nothing: that process
may still run, or may not reach S3. Therefore such a note has one effect only. The task runs in a process of its own
(``isolation.py``), whose crash is certain and harms no other task.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable

from shared.domain import keys
from shared.domain.ids import CityId, InstantField
from shared.domain.objects import BucketObject, CorruptObject
from shared.runtime import metrics
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository


class AttemptNote(BucketObject, frozen=True, kw_only=True):
    """The process that parses a city-day's file, or that crashed meanwhile."""

    process: str
    begun_at: InstantField


class Attempts:
    """The notes of one process, which runs at most one attempt at a city-day at the same time."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._repository = Repository(store)
        self._clock = clock
        self._process = uuid.uuid4().hex
        self._noted: set[str] = set()

    async def begin(self, date: dt.date, city_id: CityId) -> bool:
        """Note that this process parses a file. Return False, and note nothing, if another process has noted it."""
        key = keys.attempt(date, city_id)
        note = AttemptNote(process=self._process, begun_at=self._clock())
        while True:
            self._noted.add(key)  # before the write, whose response can be lost
            try:
                await self._repository.compare_and_swap(key, note, over=None)
            except CasConflict:
                metrics.cas_conflicts.labels("attempts").inc()
                found = await self._read(key)
                if found is None:
                    continue  # it was removed meanwhile
                if found != self._process:
                    self._noted.discard(key)
                    return False
            return True

    async def _read(self, key: str) -> str | None:
        """Return the process in a note, empty if the note is unreadable, or None without a note."""
        try:
            note = await self._repository.get(AttemptNote, key)
        except CorruptObject:
            return ""
        return note.process if note else None

    def adopt(self, date: dt.date, city_id: CityId) -> None:
        """Treat the note of another process like an own one: its file was parsed since, or refused."""
        self._noted.add(keys.attempt(date, city_id))

    async def end(self, date: dt.date, city_id: CityId) -> None:
        """Remove the note of this process, if there is one."""
        key = keys.attempt(date, city_id)
        if key in self._noted:
            await self._store.delete(key)
            self._noted.discard(key)
