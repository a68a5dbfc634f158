"""The bucket epoch: the floor of every revision, so that a bucket that was wiped never repeats a revision."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from shared.domain import keys
from shared.domain.ids import REVISION_FLOOR_MAX
from shared.domain.objects import EPOCH, BucketEpoch
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

LOST_CHANGES_MAX = 1_000_000


async def read_bucket_epoch(store: ObjectStore, clock: Callable[[], dt.datetime]) -> BucketEpoch:
    """Read the bucket's epoch. On the bucket's first use, write it."""

    async def first_use(before: BucketEpoch | None) -> BucketEpoch:
        return before or new_epoch(clock())

    epoch = await Repository(store).update(BucketEpoch, keys.BUCKET_EPOCH, first_use)
    assert epoch is not None, "a missing one is made"
    return epoch


def new_epoch(now: dt.datetime) -> BucketEpoch:
    """Return the epoch of a bucket that begins now: its floor is the time."""
    return BucketEpoch(revision_floor=int((now - EPOCH).total_seconds()), born_at=now)


async def raise_floor(store: ObjectStore, clock: Callable[[], dt.datetime]) -> None:
    """Raise the floor above every revision that a lost plan or manifest may have had.

    Its revisions began at an earlier floor, and no plan or manifest changes LOST_CHANGES_MAX times. Without this, the
    object that is made instead could have a revision that a summary already has, and would not be folded.
    """

    async def raised(before: BucketEpoch | None) -> BucketEpoch:
        now = new_epoch(clock())
        if before is None:
            return now
        floor = min(max(before.revision_floor + LOST_CHANGES_MAX, now.revision_floor), REVISION_FLOOR_MAX)
        return BucketEpoch(revision_floor=floor, born_at=before.born_at)

    await Repository(store).update(BucketEpoch, keys.BUCKET_EPOCH, raised)


def next_revision(previous: int | None, revision_floor: int) -> int:
    """Return the revision after ``previous``, and never less than the bucket's ``revision_floor``."""
    return max((previous or 0) + 1, revision_floor)
