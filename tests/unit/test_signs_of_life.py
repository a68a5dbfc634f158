"""Signs of life: whom they keep alive, who is taken for dead, and that a wrong guess does no harm."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from services.aggregate import generations
from services.aggregate.generations import RebuildLost, RebuildUnderWay
from services.operate.signs_of_life import SignOfLife, clear_dead_mark, giving_signs
from shared import keys, objects
from shared.current import read_current
from shared.objects import Current
from shared.store import StoreUnavailable
from tests.fakes import MemoryStore
from tests.unit.operated_bucket import OperatedBucket

INTERVAL_S = 10.0
QUICK_S = 0.01
DEADLINE_S = 10.0
MARK, OTHER = "token-of-the-mark", "token-of-another"


class UnwritableStore(MemoryStore):
    """A store that can be read while nothing can be written or deleted."""

    async def put(self, key: str, body: bytes) -> None:
        raise StoreUnavailable(f"{key}, of {len(body)} bytes")

    async def delete(self, key: str) -> None:
        raise StoreUnavailable(key)


class HangingStore(MemoryStore):
    """A store that never answers a write."""

    async def put(self, key: str, body: bytes) -> None:
        await asyncio.Event().wait()
        await super().put(key, body)


class Watch:
    """The sleep of one that watches: adds up what it slept, and lets something happen before it wakes."""

    def __init__(self, happens: Callable[[int], Awaitable[object]] | None = None) -> None:
        self._happens = happens
        self._sleeps = 0
        self.slept_s = 0.0
        self.told: list[str] = []

    async def sleep(self, seconds: float) -> None:
        self._sleeps += 1
        self.slept_s += seconds
        if self._happens is not None:
            await self._happens(self._sleeps)

    async def clear(self, store: MemoryStore) -> None:
        await clear_dead_mark(store, interval_s=INTERVAL_S, tell=self.told.append, sleep=self.sleep)


@pytest.fixture
async def store() -> MemoryStore:
    """Give a bucket with the mark of a rebuild that gave one sign of life."""
    store = OperatedBucket().store
    await generations.begin(store, MARK, take_over=False)
    await give(store, MARK, 1)
    return store


async def give(store: MemoryStore, token: str, number: int) -> None:
    await store.put(keys.rebuild(token), objects.encode(SignOfLife(number=number)))


async def number_given(store: MemoryStore, reached: int) -> None:
    """Wait until a sign of life of at least this number was given."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            body = store.bodies(keys.REBUILDS).get(keys.rebuild(MARK))
            if body is not None and objects.decode(SignOfLife, body, "").number >= reached:
                return
            await asyncio.sleep(0)


async def test_without_a_mark_nothing_is_waited_for() -> None:
    """Where no rebuild is under way the next one begins at once."""
    store, watch = OperatedBucket().store, Watch()
    await watch.clear(store)
    assert (watch.slept_s, watch.told, store.objects) == (0, [], {})


async def test_a_silent_rebuild_is_taken_for_dead(store: MemoryStore) -> None:
    """A sign that stands still for as long as three take is of a dead rebuild: its mark goes, and both is told."""
    watch = Watch()
    await watch.clear(store)
    assert watch.slept_s == 3 * INTERVAL_S
    assert await read_current(store) == Current(live=1, highest=2)
    assert ["watching for 30 s" in watch.told[0], "taken for dead" in watch.told[1]] == [True, True]


async def test_a_rebuild_that_never_gave_a_sign_is_taken_for_dead(store: MemoryStore) -> None:
    """A mark without any sign of life is of a dead rebuild too."""
    await store.delete(keys.rebuild(MARK))
    await Watch().clear(store)
    assert await read_current(store) == Current(live=1, highest=2)


@pytest.mark.parametrize("before", [True, False])
async def test_a_rebuild_that_lives_keeps_its_mark(store: MemoryStore, *, before: bool) -> None:
    """A new sign, be it the first or another one, refuses who finds the mark, before the watch is over."""
    if not before:
        await store.delete(keys.rebuild(MARK))
    marked = await read_current(store)
    watch = Watch(lambda sleeps: give(store, MARK, 2) if sleeps == 7 else asyncio.sleep(0))
    with pytest.raises(RebuildUnderWay, match="a rebuild is under way, into generation 2"):
        await watch.clear(store)
    assert watch.slept_s < 3 * INTERVAL_S
    assert await read_current(store) == marked


async def test_the_last_sign_in_time_counts(store: MemoryStore) -> None:
    """A sign that comes with the last look is one."""
    watch = Watch(lambda sleeps: give(store, MARK, 2) if sleeps == 15 else asyncio.sleep(0))
    with pytest.raises(RebuildUnderWay):
        await watch.clear(store)


async def test_the_sign_of_another_says_nothing(store: MemoryStore) -> None:
    """A rebuild that does not own the mark may give signs: they do not keep the owner alive."""
    await Watch(lambda sleeps: give(store, OTHER, sleeps)).clear(store)
    assert (await read_current(store)).building is None


async def test_a_sign_that_goes_away_is_no_sign(store: MemoryStore) -> None:
    """A mark that stays after its sign was deleted is of a rebuild that ended without a bucket to say so to."""
    await Watch(lambda _: store.delete(keys.rebuild(MARK))).clear(store)
    assert (await read_current(store)).building is None


async def test_a_rebuild_that_ends_meanwhile_is_not_waited_for(store: MemoryStore) -> None:
    """When the mark goes, the watch ends at once."""
    watch = Watch(lambda _: generations.abandon(store, MARK))
    await watch.clear(store)
    assert (watch.slept_s, "has ended" in watch.told[-1]) == (INTERVAL_S / 5, True)


async def test_of_two_that_wait_for_one_death_one_begins(store: MemoryStore) -> None:
    """Who decides just after another set its mark leaves that alone, and is refused when it begins."""
    others = Current(live=1, building=3, token=OTHER, highest=3)

    def another_is_quicker(line: str) -> None:
        if "taken for dead" in line:
            store.write(keys.CURRENT, objects.encode(others))

    await clear_dead_mark(store, interval_s=INTERVAL_S, tell=another_is_quicker, sleep=Watch().sleep)
    assert await read_current(store) == others
    with pytest.raises(RebuildUnderWay):
        await generations.begin(store, "third", take_over=False)


async def test_a_wrong_guess_does_no_harm(store: MemoryStore) -> None:
    """A rebuild that was taken for dead and lives fails at its flip; what is live stays live."""
    await Watch().clear(store)
    with pytest.raises(RebuildLost):
        await generations.flip(store, MARK, 2)
    assert (await generations.begin(store, OTHER, take_over=False)).building == 3
    with pytest.raises(RebuildLost):
        await generations.flip(store, MARK, 2)


async def test_a_bucket_that_cannot_be_read_decides_nothing(store: MemoryStore) -> None:
    """While nothing can be read nobody is taken for dead."""

    async def break_down(_: int) -> None:
        raise StoreUnavailable("state/")

    with pytest.raises(StoreUnavailable):
        await Watch(break_down).clear(store)
    assert (await read_current(store)).token == MARK


async def test_signs_are_given_from_first_to_last(store: MemoryStore) -> None:
    """The first sign is there before the work begins, more follow, and at the end none is left."""
    await store.delete(keys.rebuild(MARK))
    async with giving_signs(store, MARK, interval_s=QUICK_S):
        assert list(store.bodies(keys.REBUILDS)) == [keys.rebuild(MARK)]
        await number_given(store, 3)
    assert store.bodies(keys.REBUILDS) == {}


async def test_work_that_fails_leaves_no_sign(store: MemoryStore) -> None:
    """The sign of a rebuild that ends with an error goes as well, and the error is its own."""

    async def fail() -> None:
        async with giving_signs(store, MARK, interval_s=QUICK_S):
            raise RuntimeError("the work")

    with pytest.raises(RuntimeError, match="the work"):
        await fail()
    assert store.bodies(keys.REBUILDS) == {}


@pytest.mark.parametrize("kind", [UnwritableStore, HangingStore])
async def test_a_sign_that_cannot_be_written_ends_nothing(kind: type[MemoryStore]) -> None:
    """While the bucket takes no sign of life the work goes on, to its own result."""
    store = kind(OperatedBucket().clock)
    done = 0
    async with giving_signs(store, MARK, interval_s=QUICK_S):
        await asyncio.sleep(5 * QUICK_S)
        done += 1
    assert done == 1


async def test_who_gives_signs_is_not_taken_for_dead(store: MemoryStore) -> None:
    """The two halves fit: one that watches with the same interval finds the other alive."""
    async with giving_signs(store, MARK, interval_s=QUICK_S):
        with pytest.raises(RebuildUnderWay):
            await clear_dead_mark(store, interval_s=1.0, tell=lambda _: None)
