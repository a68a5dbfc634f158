"""The generation pointer, ``state/current.json``: which generation of summaries is live, and which is being built."""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable

import msgspec
from msgspec import UNSET

from shared.domain import keys, objects
from shared.domain.ids import utc_now
from shared.domain.objects import GenerationPointer
from shared.runtime.retry import DependencyUnavailable
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository


class GenerationPointerMissing(DependencyUnavailable):
    """The pointer is missing although generations other than the first exist, so the live one is unknown."""


async def read_current(store: ObjectStore) -> GenerationPointer:
    """Read which generations are live and building. A bucket without a pointer has the first generation alone.

    Raises GenerationPointerMissing if the pointer is missing and there are summaries of another generation.
    """
    return await Repository(store).get(GenerationPointer, keys.CURRENT) or await _first_generation(store)


async def update_pointer(
    store: ObjectStore, change: Callable[[GenerationPointer], Awaitable[GenerationPointer]]
) -> GenerationPointer:
    """Change the pointer by compare-and-swap, again from the start after each conflict; return the pointer then.

    ``change`` returns its argument to leave the pointer as it is. Raises GenerationPointerMissing, as `read_current`
    does.
    """

    async def change_stored(stored: GenerationPointer | None) -> GenerationPointer | None:
        before = stored or await _first_generation(store)
        after = await change(before)
        return None if after is before else after

    return await Repository(store).update(GenerationPointer, keys.CURRENT, change_stored) or GenerationPointer()


async def _first_generation(store: ObjectStore) -> GenerationPointer:
    async for listed in store.list(keys.SUMMARIES, after=_AFTER_THE_FIRST_GENERATION):
        if keys.parse_generation(listed.key) is None:
            continue
        example = objects.encode(GenerationPointer(live=2, highest=2)).decode()
        raise GenerationPointerMissing(
            f"{keys.CURRENT} is missing, and {keys.SUMMARIES} holds more than generation 1, so the live generation is "
            f"unknown. Restore the object from the bucket's versions, or write it, such as {example} for generation 2"
        )
    return GenerationPointer()


async def provision_pointer(store: ObjectStore) -> None:
    """Write the pointer of a new bucket. Does nothing if the bucket has a pointer or a summary."""
    async for _ in store.list(keys.SUMMARIES):
        return
    try:
        pointer = GenerationPointer(changes_counted_since=utc_now())
        await Repository(store).compare_and_swap(keys.CURRENT, pointer, over=None)
    except CasConflict:
        return  # there is a pointer


async def trust_change_counters(store: ObjectStore, clock: Callable[[], dt.datetime] = utc_now) -> None:
    """Let readers trust the change counters from now on. Every process that writes summaries must count their changes.

    Does nothing if they trust them already.
    """

    async def trusted(before: GenerationPointer) -> GenerationPointer:
        if before.changes_counted_since is not UNSET:
            return before
        return msgspec.structs.replace(before, changes_counted_since=clock())

    await update_pointer(store, trusted)


_AFTER_THE_FIRST_GENERATION = f"{keys.summaries_of_generation(GenerationPointer().live)}~"
"""A key after every key of the first generation and before every key of another one."""
