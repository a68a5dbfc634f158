"""Raising the base of the lineage: never below what the topic knows, never back."""

from __future__ import annotations

import pytest

from services.operate.restoring import CannotRestore, Restored, TopicHighest, raise_base, seconds_of
from shared import keys, objects
from shared.objects import Lineage
from tests.fakes import Clock, MemoryStore
from tests.unit.operated_bucket import NOON

KNOWN = TopicHighest(revision=500, key="2024-05-01/armenia/7", records=10)


def store_with(base: int | None) -> MemoryStore:
    store = MemoryStore(Clock(NOON))
    if base is not None:
        store.write(keys.LINEAGE, objects.encode(Lineage(base=base, born_at=NOON)))
    return store


async def raised(
    store: MemoryStore, *, topic: TopicHighest | None = KNOWN, wanted: int | None = None, dry_run: bool = False
) -> Restored:
    return await raise_base(store, topic=topic, wanted=wanted, clock=Clock(NOON), dry_run=dry_run)


def base_of(store: MemoryStore) -> int | None:
    stored = store.objects.get(keys.LINEAGE)
    return objects.decode(Lineage, stored.body, keys.LINEAGE).base if stored else None


@pytest.mark.parametrize(("before", "after"), [(None, 501), (10, 501), (500, 501), (501, 501), (900, 900)])
async def test_the_base_ends_just_above_what_the_topic_knows(before: int | None, after: int) -> None:
    """By itself the base becomes the topic's highest revision plus one, unless it is above that already."""
    store = store_with(before)
    restored = await raised(store)
    assert (restored.base_before, restored.base, base_of(store)) == (before, after, after)


async def test_a_base_is_taken_as_given_if_it_is_above_everything() -> None:
    """A base that was asked for is taken; one that the topic knows, or that would lower it, is refused by name."""
    store = store_with(600)
    for wanted, reason in ((500, "2024-05-01/armenia/7"), (550, "never lowered")):
        with pytest.raises(CannotRestore, match=reason):
            await raised(store, wanted=wanted)
    assert base_of(store) == 600
    assert (await raised(store, wanted=700)).base == base_of(store) == 700


async def test_with_kafka_lost_the_present_time_will_do() -> None:
    """Without the topic the base has to be given; the present time is above all that any bucket gave out."""
    store = store_with(10)
    with pytest.raises(CannotRestore, match="give --now"):
        await raised(store, topic=None)
    assert (await raised(store, topic=None, wanted=seconds_of(NOON))).base == base_of(store) == seconds_of(NOON)


async def test_a_dry_run_raises_nothing() -> None:
    """A dry run tells the base that would be, and writes none."""
    store = store_with(10)
    assert (await raised(store, dry_run=True)).base == 501
    assert base_of(store) == 10
