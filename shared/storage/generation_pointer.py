"""Which generation of summaries is live, and which one is being built: ``state/current.json``."""

from __future__ import annotations

from shared.domain import keys, objects
from shared.domain.objects import GenerationPointer
from shared.runtime.retry import DependencyUnavailable
from shared.storage.object_store import CasConflict, ObjectStore


class PointerLost(DependencyUnavailable):
    """The pointer is missing although generations other than the first exist: nobody may guess which one is live."""


async def read_current(store: ObjectStore) -> GenerationPointer:
    """Read which generations are live and building. Raises PointerLost if that cannot be known."""
    return (await read_pointer(store))[0]


async def read_pointer(store: ObjectStore) -> tuple[GenerationPointer, str | None]:
    """Read the pointer with its ETag. A bucket that never had one has the first generation alone, and no ETag.

    Raises PointerLost if the pointer is missing and there are summaries of another generation.
    """
    found = await store.get(keys.CURRENT)
    if found is not None:
        return objects.decode(GenerationPointer, found.body, keys.CURRENT), found.etag
    async for listed in store.list(keys.SUMMARIES, after=_AFTER_THE_FIRST_GENERATION):
        if keys.parse_generation(listed.key) is None:
            continue
        example = objects.encode(GenerationPointer(live=2, highest=2)).decode()
        raise PointerLost(
            f"{keys.CURRENT} is missing, and {keys.SUMMARIES} holds more than generation 1, so the live generation is "
            f"unknown. Restore the object from the bucket's versions, or write it, such as {example} for generation 2"
        )
    return GenerationPointer(), None


async def provision_pointer(store: ObjectStore) -> None:
    """Write the pointer of a new bucket. A bucket that has a pointer, or any summary, stays as it is."""
    async for _ in store.list(keys.SUMMARIES):
        return
    try:
        await store.compare_and_swap(keys.CURRENT, objects.encode(GenerationPointer()), etag=None)
    except CasConflict:
        return  # there is a pointer


_AFTER_THE_FIRST_GENERATION = f"{keys.summaries_of_generation(GenerationPointer().live)}~"
"""Greater than every key of the first generation, and less than every key of another one."""
