"""The bucket epoch: the floor of every revision, so that a bucket that was wiped never repeats a revision."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from shared.domain import keys
from shared.domain.objects import EPOCH, BucketEpoch
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository


async def read_bucket_epoch(store: ObjectStore, clock: Callable[[], dt.datetime]) -> BucketEpoch:
    """Read the bucket's epoch. On the bucket's first use, write it."""

    async def first_use(before: BucketEpoch | None) -> BucketEpoch:
        now = clock()
        return before or BucketEpoch(revision_floor=int((now - EPOCH).total_seconds()), born_at=now)

    epoch = await Repository(store).update(BucketEpoch, keys.BUCKET_EPOCH, first_use)
    assert epoch is not None, "a missing one is made"
    return epoch


def next_revision(previous: int | None, revision_floor: int) -> int:
    """Return the revision after ``previous``, and never less than the bucket's ``revision_floor``."""
    return max((previous or 0) + 1, revision_floor)
