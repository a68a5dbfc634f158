"""The background check of the change index: what counts as missed."""

from __future__ import annotations

import asyncio
import datetime as dt

import pytest

from services.api.http.date_range import DateRange
from services.api.statistics import index_check
from services.api.statistics.index_check import UNCOUNTED_AFTER_S, IndexCheck
from services.api.statistics.reader import SummaryReader
from shared.domain import keys, objects
from shared.domain.ids import CountrySlug
from shared.domain.objects import GenerationPointer
from shared.storage.change_index import ChangeCounter
from tests.fakes.api import NOW, World, stats
from tests.fakes.metrics import value

DAYS = DateRange(dt.date(2024, 4, 1), dt.date(2024, 5, 31))
APRIL, MAY = dt.date(2024, 4, 2), dt.date(2024, 5, 2)


class CheckedWorld(World):
    """A world of two months with a trusted index, a reader that keeps both, and its check."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        pointer = GenerationPointer(changes_counted_since=NOW)
        self.store.write(keys.CURRENT, objects.encode(pointer))
        self.reader = SummaryReader(self.store, cache_bytes=1 << 20, clock_s=lambda: self.now_s)
        self.check = IndexCheck(self.reader, clock_s=lambda: self.now_s)
        self.missed_before = value("tripfold_uncounted_summaries_total")
        for date in (APRIL, MAY):
            self.fold_in(stats("armenia", date))

    @property
    def missed(self) -> int:
        """The number of changes that the check counted as missed."""
        return int(value("tripfold_uncounted_summaries_total") - self.missed_before)

    async def check_all(self) -> None:
        """Check each month once."""
        for _ in range(2):
            await self.check.check_next()

    async def trips(self) -> list[int]:
        """Return what a query says."""
        heads = (await self.reader.read(DAYS)).heads
        return [head.totals.trips for head in sorted(heads, key=lambda head: head.date)]


async def test_a_change_that_nobody_counts_is_missed_after_minutes() -> None:
    """Until then a writer may count it. Afterwards the metric counts it once, and queries show it."""
    world = CheckedWorld()
    assert await world.trips() == [8, 8]
    world.fold_in(stats("armenia", MAY, trips=9, revision=6))
    world.fold_in(stats("belgium", MAY, trips=1))
    for _ in range(2):
        await world.check_all()
        assert (world.missed, await world.trips()) == (0, [8, 8])
        world.now_s += UNCOUNTED_AFTER_S - 1
        await world.check_all()
        world.now_s += 1 - UNCOUNTED_AFTER_S
    world.now_s += UNCOUNTED_AFTER_S
    await world.check_all()
    assert (world.missed, sorted(await world.trips())) == (2, [1, 8, 9])
    world.now_s += UNCOUNTED_AFTER_S
    await world.check_all()
    assert world.missed == 2


async def test_a_deleted_summary_is_missed_too() -> None:
    """Nobody deletes a live summary and counts it."""
    world = CheckedWorld()
    await world.trips()
    await world.store.delete(keys.summary(1, MAY, CountrySlug("armenia")))
    await world.check_all()
    world.now_s += UNCOUNTED_AFTER_S
    await world.check_all()
    assert (world.missed, await world.trips()) == (1, [8])


async def test_a_change_that_is_counted_late_is_not_missed() -> None:
    """After a writer that crashed another one counts, whether a query comes in between or not."""
    for asks in (True, False):
        world = CheckedWorld()
        await world.trips()
        world.fold_in(stats("armenia", MAY, trips=9, revision=6))
        await world.check_all()
        await ChangeCounter(world.store).count(1, [keys.month_of(MAY)])
        if asks:
            assert await world.trips() == [8, 9]
        world.now_s += UNCOUNTED_AFTER_S
        await world.check_all()
        assert world.missed == 0
        assert await world.trips() == [8, 9]


async def test_nothing_is_checked_without_the_switch() -> None:
    """Without a trusted index nothing is kept."""
    world = CheckedWorld()
    await world.trips()
    world.make_live(1)
    world.fold_in(stats("armenia", MAY, trips=9, revision=6))
    for _ in range(2):
        await world.check_all()
        world.now_s += UNCOUNTED_AFTER_S
    assert world.missed == 0


async def test_an_outage_does_not_end_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that fails is logged, and the next one follows."""
    world = CheckedWorld()
    world.store.down = True
    monkeypatch.setattr(index_check, "INTERVAL_S", 0.0)
    task = asyncio.create_task(world.check.run())
    for _ in range(20):
        await asyncio.sleep(0)
    world.store.down = False
    world.store.reads.clear()
    for _ in range(20):
        await asyncio.sleep(0)
    assert keys.CURRENT in world.store.reads
    task.cancel()
