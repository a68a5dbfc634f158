"""Typed objects of the bucket."""

from __future__ import annotations

import pytest

from shared.domain import keys, objects
from shared.domain.ids import utc_now
from shared.domain.objects import CorruptObject, GenerationPointer
from shared.storage.object_store import CasConflict, StoreUnavailable
from shared.storage.repository import TRIES_MAX, Repository
from tests.fakes.store import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    """Return an empty bucket."""
    return MemoryStore(utc_now)


async def test_a_missing_object_is_none_and_an_unreadable_one_is_corrupt(store: MemoryStore) -> None:
    """The two differ, so a damaged object is never overwritten as if it were missing."""
    repository = Repository(store)
    assert await repository.get(GenerationPointer, keys.CURRENT) is None
    assert await repository.read(GenerationPointer, keys.CURRENT) is None
    store.write(keys.CURRENT, b"{")
    with pytest.raises(CorruptObject):
        await repository.get(GenerationPointer, keys.CURRENT)
    with pytest.raises(CorruptObject):
        await repository.update(GenerationPointer, keys.CURRENT, lambda _: _return(GenerationPointer()))


async def test_a_compare_and_swap_succeeds_once_per_read(store: MemoryStore) -> None:
    """A second write over the same read is a conflict, for an object as for a missing one."""
    repository = Repository(store)
    await repository.compare_and_swap(keys.CURRENT, GenerationPointer(live=1), over=None)
    read = await repository.read(GenerationPointer, keys.CURRENT)
    assert read is not None
    await repository.compare_and_swap(keys.CURRENT, GenerationPointer(live=2), over=read)
    for stale in (None, read):
        with pytest.raises(CasConflict):
            await repository.compare_and_swap(keys.CURRENT, GenerationPointer(live=3), over=stale)
    assert await repository.get(GenerationPointer, keys.CURRENT) == GenerationPointer(live=2)


async def test_an_update_is_computed_anew_after_a_cas_conflict(store: MemoryStore) -> None:
    """The change is computed again from the object that another writer stored, and neither change is lost."""

    async def change(before: GenerationPointer | None) -> GenerationPointer:
        if before is None:
            store.write(keys.CURRENT, objects.encode(GenerationPointer(highest=5)))
            return GenerationPointer()
        return GenerationPointer(live=2, highest=before.highest)

    expected = GenerationPointer(live=2, highest=5)
    assert await Repository(store).update(GenerationPointer, keys.CURRENT, change) == expected
    assert await Repository(store).get(GenerationPointer, keys.CURRENT) == expected


async def test_an_update_that_changes_nothing_writes_nothing(store: MemoryStore) -> None:
    """An unchanged object keeps its ETag; a missing object stays missing."""
    repository = Repository(store)
    assert await repository.update(GenerationPointer, keys.CURRENT, lambda _: _return(None)) is None
    assert store.objects == {}
    store.write(keys.CURRENT, objects.encode(GenerationPointer(live=7)))
    written = dict(store.objects)
    for change in (_return, lambda _: _return(None)):
        assert await repository.update(GenerationPointer, keys.CURRENT, change) == GenerationPointer(live=7)
    assert store.objects == written


async def test_an_update_gives_up_after_its_limit_of_cas_conflicts(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After TRIES_MAX conflicts an update fails like an outage, which its callers retry with backoff."""
    monkeypatch.setattr("shared.storage.repository.WAIT_FIRST_S", 0.0)
    tries = 0

    async def change(_: GenerationPointer | None) -> GenerationPointer:
        nonlocal tries
        tries += 1
        store.write(keys.CURRENT, objects.encode(GenerationPointer(highest=tries)))
        return GenerationPointer(live=2)

    with pytest.raises(StoreUnavailable, match=keys.CURRENT):
        await Repository(store).update(GenerationPointer, keys.CURRENT, change)
    assert tries == TRIES_MAX


async def test_a_create_gives_up_if_the_store_decides_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that refuses each write, and never shows the object of a winner, is not asked for ever."""
    monkeypatch.setattr("shared.storage.repository.WAIT_FIRST_S", 0.0)
    writes = 0

    class Undecided(MemoryStore):
        async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
            nonlocal writes
            writes += 1
            raise CasConflict(f"{key}, {body!r} over {etag}")

    with pytest.raises(StoreUnavailable, match=keys.CURRENT):
        await Repository(Undecided(utc_now)).create_if_absent(keys.CURRENT, GenerationPointer())
    assert writes == TRIES_MAX


async def _return(value: GenerationPointer | None) -> GenerationPointer | None:
    return value
