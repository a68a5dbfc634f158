"""The bucket's birth: the floor of every revision minted in it, so that a wiped bucket never repeats one."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from shared.domain import keys
from shared.domain.objects import EPOCH, BucketEpoch
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository


async def read_bucket_epoch(store: ObjectStore, clock: Callable[[], dt.datetime]) -> BucketEpoch:
    """Read the bucket's lineage, or write it if this is the bucket's first use."""

    async def born(before: BucketEpoch | None) -> BucketEpoch:
        now = clock()
        return before or BucketEpoch(base=int((now - EPOCH).total_seconds()), born_at=now)

    epoch = await Repository(store).update(BucketEpoch, keys.LINEAGE, born)
    assert epoch is not None, "a missing one is made"
    return epoch


def next_revision(previous: int | None, base: int) -> int:
    """Return the revision after ``previous``: never below ``base``, the floor of the bucket's lineage."""
    return max((previous or 0) + 1, base)
