"""The check of a bucket for readiness."""

from __future__ import annotations

import asyncio

import pytest

from shared.domain import keys
from shared.domain.ids import utc_now
from shared.storage.bucket_check import BucketCheck
from shared.storage.object_store import StoredObject, StoreUnavailable
from tests.fakes.store import MemoryStore


class Bucket(MemoryStore):
    """Notes the requests of a check. It refuses those in ``down``; those in ``hanging`` get no response, once each."""

    def __init__(self) -> None:
        super().__init__(utc_now)
        self.made: list[str] = []
        self.down: set[str] = set()
        self.hanging: list[str] = []
        self.writes_left = 1

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        await self._note(f"read {key}")
        return await super().get(key, first_bytes=first_bytes)

    async def check_next(self) -> bool:
        """Try a write. The first check takes ``writes_left`` of them."""
        await self._note("write")
        self.writes_left = max(0, self.writes_left - 1)
        return not self.writes_left

    async def _note(self, what: str) -> None:
        self.made.append(what)
        if what in self.hanging:
            self.hanging.remove(what)
            await asyncio.Event().wait()
        if what in self.down:
            raise StoreUnavailable(f"{what} is down")


READ = f"read {keys.SCHEMA_SWITCH}"


async def test_a_check_makes_one_request_and_takes_turns() -> None:
    """The first check reads and tries a write. Each later one makes one request, in turn."""
    bucket = Bucket()
    check = BucketCheck(bucket, timeout_s=30)
    for _ in range(4):
        await check()
    assert bucket.made == [READ, "write", READ, "write", READ]


@pytest.mark.parametrize("fault", [READ, "write"])
async def test_a_fault_lasts_until_the_same_request_succeeds(fault: str) -> None:
    """A bucket that can be read and not written stays faulty, and the other way round."""
    bucket = Bucket()
    check = BucketCheck(bucket, timeout_s=30)
    await check()
    bucket.down = {fault}
    failed = 0
    for _ in range(6):
        try:
            await check()
        except StoreUnavailable:
            failed += 1
    assert failed >= 5
    bucket.down.clear()
    await check()
    assert bucket.made[-1] == fault


async def test_a_slow_bucket_passes_in_the_end() -> None:
    """A check goes on with the request that took too long, so every request needs to succeed only once."""
    bucket = Bucket()
    bucket.writes_left = 3
    bucket.hanging = [READ, "write", "write"]
    check = BucketCheck(bucket, timeout_s=0.01)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=r"^S3 did not respond within 0\.01 s$"):
            await check()
    await check()
    assert bucket.made == [READ, READ, *["write"] * 5]
