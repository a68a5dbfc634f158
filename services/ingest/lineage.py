"""The bucket's birth: the floor of every revision minted in it, so that a wiped bucket never repeats one."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from shared import keys, objects
from shared.objects import EPOCH, Lineage
from shared.store import LostRace, ObjectStore


async def read_lineage(store: ObjectStore, clock: Callable[[], dt.datetime]) -> Lineage:
    """Read the bucket's lineage, or write it if this is the bucket's first use."""
    while True:
        found = await store.get(keys.LINEAGE)
        if found is not None:
            return objects.decode(Lineage, found.body, keys.LINEAGE)
        now = clock()
        born = Lineage(base=int((now - EPOCH).total_seconds()), born_at=now)
        try:
            await store.swap(keys.LINEAGE, objects.encode(born), etag=None)
        except LostRace:
            continue
        return born


def next_revision(previous: int | None, base: int) -> int:
    """Return the revision after ``previous``: never below ``base``, the floor of the bucket's lineage."""
    return max((previous or 0) + 1, base)
