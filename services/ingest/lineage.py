"""The bucket's birth: the floor of every revision minted in it, so that a wiped bucket never repeats one."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from shared import keys
from shared.objects import EPOCH, Lineage
from shared.repository import Repository
from shared.store import ObjectStore


async def read_lineage(store: ObjectStore, clock: Callable[[], dt.datetime]) -> Lineage:
    """Read the bucket's lineage, or write it if this is the bucket's first use."""

    async def born(before: Lineage | None) -> Lineage:
        now = clock()
        return before or Lineage(base=int((now - EPOCH).total_seconds()), born_at=now)

    lineage = await Repository(store).update(Lineage, keys.LINEAGE, born)
    assert lineage is not None, "a missing one is made"
    return lineage


def next_revision(previous: int | None, base: int) -> int:
    """Return the revision after ``previous``: never below ``base``, the floor of the bucket's lineage."""
    return max((previous or 0) + 1, base)
