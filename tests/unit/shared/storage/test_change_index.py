"""The change index: what a writer counts, and when it counts as stored."""

from __future__ import annotations

import asyncio

import pytest

from shared.domain import keys, objects
from shared.domain.objects import ChangeCounters
from shared.storage.change_index import (
    GENERATIONS_MAX,
    LOOKS_APART_MAX_S,
    ChangeCounter,
    WriterCounters,
    moved_months,
    read_counters,
)
from shared.storage.object_store import StoredObject, StoreUnavailable
from tests.fakes.bucket import NOON
from tests.fakes.builders import Clock
from tests.fakes.faults import Break, PortCalls, ProcessLife
from tests.fakes.store import BreakableStore, MemoryStore


def counted(store: MemoryStore, generation: int = 1) -> list[dict[str, int]]:
    """Return the counters of each writer of a generation."""
    prefix = keys.changes_of_generation(generation)
    return [objects.decode(ChangeCounters, body, key).months for key, body in store.bodies(prefix).items()]


async def test_each_writer_has_counters_of_its_own() -> None:
    """Counters grow in the object of their writer and generation."""
    store = MemoryStore(Clock(NOON))
    one, other = ChangeCounter(store), ChangeCounter(store)
    await one.count(1, ["2024-05", "2024-06", "2024-05"])
    await one.count(1, ["2024-06"])
    await one.count(2, ["2023-01"])
    await other.count(1, ["2024-05"])
    assert sorted(map(len, counted(store))) == [1, 2]
    assert {"2024-05": 1, "2024-06": 2} in counted(store)
    assert counted(store, 2) == [{"2023-01": 1}]


async def test_nothing_to_count_writes_nothing() -> None:
    """Without a month no object is made."""
    store = MemoryStore(Clock(NOON))
    await ChangeCounter(store).count(1, [])
    assert store.objects == {}


async def test_callers_during_a_write_share_the_next_one() -> None:
    """However many callers there are, one write is in flight, and each caller is in a write that began after it."""
    store = MemoryStore(Clock(NOON))
    calls = PortCalls()
    counter = ChangeCounter(BreakableStore(store, ProcessLife("writer", calls)))
    await asyncio.gather(*(counter.count(1, [f"2024-{month:02}"]) for month in range(1, 13)))
    assert len(calls.made) == 2
    assert counted(store) == [{f"2024-{month:02}": 1 for month in range(1, 13)}]


async def test_deleted_counters_are_created_again_and_count_on() -> None:
    """A writer whose object gc deleted creates it with all that it has counted."""
    store = MemoryStore(Clock(NOON))
    counter = ChangeCounter(store)
    await counter.count(1, ["2024-05"])
    (key,) = store.objects
    await store.delete(key)
    await counter.count(1, ["2024-05", "2024-06"])
    assert list(store.objects) == [key]
    assert counted(store) == [{"2024-05": 2, "2024-06": 1}]


@pytest.mark.parametrize("how", [Break.LOST_ANSWER, Break.REFUSED, Break.SENT_TWICE, Break.UNDECIDED])
@pytest.mark.parametrize("number", range(3))
async def test_a_count_that_returns_is_stored_whichever_write_breaks(how: Break, number: int) -> None:
    """A caller whose count fails counts again. At last the counters have risen with each change."""
    store = MemoryStore(Clock(NOON))
    counter = ChangeCounter(BreakableStore(store, ProcessLife("writer", PortCalls({number: how}))))
    seen = 0
    for _ in range(3):
        while True:
            try:
                await counter.count(1, ["2024-05"])
            except StoreUnavailable:
                continue
            break
        ((months),) = counted(store)
        assert months["2024-05"] > seen
        seen = months["2024-05"]


async def test_a_late_write_does_not_take_counters_back() -> None:
    """A write that was given up and arrives after the next one changes nothing."""
    late: list[tuple[bytes, str | None]] = []

    class Slow(MemoryStore):
        async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
            if not late:
                late.append((body, etag))
                raise StoreUnavailable("timed out")
            return await super().compare_and_swap(key, body, etag=etag)

    for before in (0, 1):
        store = Slow(Clock(NOON))
        late[:] = [(b"", None)] * before
        counter = ChangeCounter(store)
        if before:
            await counter.count(1, ["2024-04"])
            late.clear()
        with pytest.raises(StoreUnavailable):
            await counter.count(1, ["2024-05"])
        await counter.count(1, ["2024-05"])
        (key,) = store.objects
        stored = store.objects[key].body
        body, etag = late[0]
        await asyncio.gather(store.compare_and_swap(key, body, etag=etag), return_exceptions=True)
        assert store.objects[key].body == stored


async def test_a_forgotten_generation_gets_a_new_object() -> None:
    """A process that has written many generations forgets the first, and never takes its counters back."""
    store = MemoryStore(Clock(NOON))
    counter = ChangeCounter(store)
    for generation in range(1, GENERATIONS_MAX + 2):
        await counter.count(generation, ["2024-05"])
    await counter.count(1, ["2024-05"])
    assert counted(store) == [{"2024-05": 1}] * 2


async def test_a_writer_learns_whether_others_have_counted_since_its_last_look() -> None:
    """Its own counts do not matter. New, raised and vanished counters do, and so does another generation."""
    store = MemoryStore(Clock(NOON))
    one, other = ChangeCounter(store), ChangeCounter(store)
    assert await one.others_have_counted(1)
    await one.count(1, ["2024-05"])
    assert not await one.others_have_counted(1)
    for _ in range(2):
        await other.count(1, ["2024-05"])
        assert await one.others_have_counted(1)
        assert not await one.others_have_counted(1)
    for key in store.bodies(keys.CHANGES):
        await store.delete(key)
    assert await one.others_have_counted(1)
    assert await one.others_have_counted(2)
    assert await one.others_have_counted(1)


async def test_a_writer_that_has_not_looked_for_long_trusts_no_listing() -> None:
    """Other counters may have come and gone since."""
    now_s = 0.0
    one = ChangeCounter(MemoryStore(Clock(NOON)), clock_s=lambda: now_s)
    await one.others_have_counted(1)
    now_s += LOOKS_APART_MAX_S
    assert not await one.others_have_counted(1)
    now_s += LOOKS_APART_MAX_S + 1
    assert await one.others_have_counted(1)


def test_months_whose_counter_fell_or_is_gone_have_moved() -> None:
    """A restored bucket has earlier counters, and earlier summaries."""
    before = {"writer": WriterCounters("a", {"2024-04": 1, "2024-05": 2, "2024-06": 1})}
    restored = {"writer": WriterCounters("b", {"2024-04": 1, "2024-05": 1})}
    assert moved_months(before, restored) == {"2024-05", "2024-06"}


async def test_counters_that_are_deleted_after_the_listing_invalidate_every_month() -> None:
    """Also those of a writer that the reader did not know: nobody can tell what it counted."""

    class Deleting(MemoryStore):
        async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
            await self.delete(key)
            return await super().get(key, first_bytes=first_bytes)

    store = Deleting(Clock(NOON))
    store.write(keys.changes(1, "writer"), objects.encode(ChangeCounters(months={"2024-05": 1})))
    assert moved_months({}, await read_counters(store, 1, {})) is None
