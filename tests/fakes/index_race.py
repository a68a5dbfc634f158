"""Writers, gc, an operator and a reader of the change index, interleaved at random at every call of the reader."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from services.aggregate.fold import empty_summary
from services.api.http.date_range import DateRange
from services.api.statistics.reader import SummaryReader
from shared.domain import keys, objects
from shared.domain.ids import CountrySlug
from shared.domain.objects import GenerationPointer
from shared.storage.change_index import COUNTERS_AGE_MIN, ChangeCounter
from shared.storage.generation_pointer import trust_change_counters
from shared.storage.object_store import CasConflict, ObjectInfo, StoredObject, StoreUnavailable
from tests.fakes.builders import Clock
from tests.fakes.store import MemoryStore

DATES = (dt.date(2024, 5, 1), dt.date(2024, 6, 1))
COUNTRIES = (CountrySlug("armenia"), CountrySlug("brasil"))
QUERIES = 6
STEPS_MAX = 4
START = dt.datetime(2024, 7, 1, tzinfo=dt.UTC)

ARRIVES_LATE = 0.4
TIMES_OUT = 0.2
UNCONDITIONAL = "unconditional"

_Write = tuple[str, bytes, str | None]
CountryDay = tuple[dt.date, CountrySlug]


class Race:
    """One bucket. A version is promised once a writer has counted it, or an old build wrote it with the switch off."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._clock = Clock(START)
        self._store = MemoryStore(self._clock)
        self._store.write(keys.CURRENT, objects.encode(GenerationPointer(changes_counted_since=START)))
        self._versions: dict[CountryDay, int] = {}
        self._promised: dict[CountryDay, int] = {}
        self._uncounted: list[set[CountryDay]] = [set(), set()]
        self._late: list[_Write] = []
        self._writers = [self._writer(), self._writer()]
        self._reader_store = _SteppedStore(self._store, self._step_sometimes)
        clock_s = lambda: self._clock().timestamp()  # noqa: E731 - shorter than a method
        self._reader = SummaryReader(self._reader_store, cache_bytes=1 << 20, clock_s=clock_s)

    async def complaints(self) -> AsyncIterator[str]:
        """Query between and during other steps; name each promised version that a query lacks."""
        for _ in range(QUERIES):
            for _ in range(self._dice.randrange(STEPS_MAX)):
                await self._step()
            promised = dict(self._promised)
            heads = (await self._reader.read(DateRange(DATES[0], DATES[-1]))).heads
            served = {(head.date, head.country): head.version for head in heads}
            for country_day, version in promised.items():
                if served.get(country_day, 0) < version:
                    yield f"{country_day}: version {version} was promised, {served.get(country_day)} is served"

    def _writer(self) -> ChangeCounter:
        return ChangeCounter(_LateStore(self._store, self._late, self._dice))

    async def _step_sometimes(self) -> None:
        while self._dice.random() < 0.3:
            await self._step()

    async def _step(self) -> None:
        place = self._dice.randrange(len(self._writers))
        match self._dice.randrange(10):
            case 0 | 1 | 2:
                self._uncounted[place].add(self._write())
            case 3 | 4 | 5:
                await self._count(place)
            case 6:
                self._writers[place] = self._writer()
            case 7:
                await self._delete_counters()
            case 8:
                await self._arrive_late()
            case _:
                await self._turn_off_and_on()

    def _write(self) -> CountryDay:
        date, country = self._dice.choice(DATES), self._dice.choice(COUNTRIES)
        version = self._versions[date, country] = self._versions.get((date, country), 0) + 1
        summary = msgspec.structs.replace(empty_summary(date, country), version=version)
        self._store.write(keys.summary(1, date, country), objects.encode(summary))
        return date, country

    async def _count(self, place: int) -> None:
        """Count what a writer has written. A crashed writer leaves it to the next one, as the topic does."""
        written = {country_day: self._versions[country_day] for country_day in self._uncounted[place]}
        try:
            await self._writers[place].count(1, {keys.month_of(date) for date, _ in written})
        except StoreUnavailable:
            return
        self._uncounted[place] -= written.keys()
        for country_day, version in written.items():
            self._promised[country_day] = max(version, self._promised.get(country_day, 0))

    async def _delete_counters(self) -> None:
        """Delete counters that the reader knows, at any time; or all of them by gc, which waits for their age."""
        deleted = self._reader_store.counters_seen
        if self._dice.random() < 0.5:
            self._clock.advance(COUNTERS_AGE_MIN.total_seconds())
            deleted = set(self._store.bodies(keys.CHANGES))
        self._late.clear()  # no request takes so long
        for key in deleted:
            await self._store.delete(key)

    async def _arrive_late(self) -> None:
        if self._late:
            key, body, etag = self._late.pop(self._dice.randrange(len(self._late)))
            if etag == UNCONDITIONAL:
                self._store.write(key, body)
                return
            try:
                await self._store.compare_and_swap(key, body, etag=etag)
            except CasConflict:
                return

    async def _turn_off_and_on(self) -> None:
        """Let an old build write the pointer and a summary, and finalize the upgrade again sooner or later."""
        self._store.write(keys.CURRENT, objects.encode(GenerationPointer()))
        for _ in range(self._dice.randrange(2)):
            country_day = self._write()
            self._promised[country_day] = self._versions[country_day]
        if self._dice.random() < 0.8:
            self._clock.advance(1)
            await trust_change_counters(self._store, self._clock)


class _LateStore(MemoryStore):
    """The store of a writer: a write can time out and arrive later, or arrive a second time."""

    def __init__(self, store: MemoryStore, late: list[_Write], dice: random.Random) -> None:
        super().__init__(lambda: START)
        self.objects = store.objects
        self._late = late
        self._dice = dice

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        self._delay(key, body, etag)
        return await super().compare_and_swap(key, body, etag=etag)

    async def put(self, key: str, body: bytes) -> None:
        self._delay(key, body, UNCONDITIONAL)
        await super().put(key, body)

    def _delay(self, key: str, body: bytes, etag: str | None) -> None:
        chance = self._dice.random()
        if chance < ARRIVES_LATE:
            self._late.append((key, body, etag))
        if chance < TIMES_OUT:
            raise StoreUnavailable(f"the write of {key} timed out")


class _SteppedStore(MemoryStore):
    """The store of a reader: others take steps before each of its calls, and between the entries of a listing."""

    def __init__(self, store: MemoryStore, step: Callable[[], Awaitable[None]]) -> None:
        super().__init__(lambda: START)
        self.objects = store.objects
        self._step = step
        self.counters_seen: set[str] = set()

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        await self._step()
        return await super().get(key, first_bytes=first_bytes)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        await self._step()
        seen = set()
        async for listed in super().list(prefix, after=after):
            seen.add(listed.key)
            yield listed
            await self._step()
        if prefix.startswith(keys.CHANGES):
            self.counters_seen = seen
