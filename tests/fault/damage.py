"""Damages objects of a world at rest, and mends them as an operator does."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Sequence

from shared.domain import keys
from shared.domain.objects import CorruptObject
from shared.domain.requests import status_of
from shared.storage.generation_pointer import read_current
from tests.fakes.builders import UpstreamState
from tests.fakes.store import MemoryStore
from tests.fault import checks
from tests.fault.world import DATE, NotAtRest, World

OTHER_DATE = DATE + dt.timedelta(days=1)
STOPPING = (keys.BUCKET_EPOCH, keys.COUNTRIES, keys.CURRENT)
"""Every process waits while one of these cannot be read."""


def damage(world: World, which: Sequence[int], body: bytes | None) -> list[str]:
    """Write ``body`` in place of some objects except raw ones, or remove them; return their keys."""
    damaged = []
    for number in which:
        candidates = sorted(key for key in world.store.objects if not key.startswith(keys.RAW))
        if not candidates:
            break
        key = candidates[number % len(candidates)]
        damaged.append(key)
        if body is None:
            del world.store.objects[key]
        else:
            MemoryStore.write(world.store, key, body)
    return damaged


async def requeue_all(world: World) -> None:
    """Let everything run to its end. The requeue looks at the latest requests only, most times."""
    await world.run_to_rest()
    for _ in checks.requests(world):
        await world.requeue()
        await world.run_to_rest()
        if not checks.unfinished(world):
            break


async def go_on(world: World, truth: UpstreamState) -> list[str]:
    """Request both dates beside the damage. Name each request that does not end.

    The request of the date may be refused by the API, or fail. The one of the other date must not notice the damage:
    no process may wait for it.
    """
    before = len(world.unexpected)
    with contextlib.suppress(CorruptObject):
        world.request(truth)
    other = world.request(truth, date=OTHER_DATE)
    try:
        await world.run_to_rest()
    except NotAtRest as error:
        return [f"the damage stops a process: {error}"]
    wrong = [one for one in world.unexpected[before:] if one.startswith("batch") and "readable" in one]
    found = status_of(checks.record_of(world, other))
    if not found.ended or found.value == "failed":
        wrong.append(f"the request of another date: {found.value}")
    return wrong


async def mend(world: World, truth: UpstreamState, *, is_lost: bool) -> None:
    """Mend the bucket as an operator does, and request both dates again.

    A rebuild that was interrupted begins again: `repair` mends the live generation only. After objects were lost, the
    bucket is like a restored one.
    """
    await world.repair()
    if (await read_current(world.store)).building is not None:
        await world.rebuild()
    if is_lost:
        await world.restore()
    await requeue_all(world)
    for date in (DATE, OTHER_DATE):
        world.request(truth, date=date)
    await world.run_to_rest()
