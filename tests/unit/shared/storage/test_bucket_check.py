"""The check of a bucket for readiness."""

from __future__ import annotations

import pytest

from shared.domain import keys
from shared.domain.ids import utc_now
from shared.storage.bucket_check import BucketCheck
from shared.storage.object_store import StoredObject, StoreUnavailable
from tests.fakes.store import MemoryStore


class Bucket(MemoryStore):
    """A bucket that notes which requests a check makes. ``down`` names those that it refuses."""

    def __init__(self) -> None:
        super().__init__(utc_now)
        self.made: list[str] = []
        self.down: set[str] = set()

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        self._note(f"read {key}")
        return await super().get(key, first_bytes=first_bytes)

    async def check(self) -> None:
        """Try a write."""
        self._note("write")

    def _note(self, what: str) -> None:
        self.made.append(what)
        if what in self.down:
            raise StoreUnavailable(f"{what} is down")


READ = f"read {keys.SCHEMA_SWITCH}"


async def test_a_check_makes_one_request_and_takes_turns() -> None:
    """The first check reads and tries a write. Each later one makes one request, in turn."""
    bucket = Bucket()
    check = BucketCheck(bucket)
    for _ in range(4):
        await check()
    assert bucket.made == [READ, "write", READ, "write", READ]


@pytest.mark.parametrize("fault", [READ, "write"])
async def test_a_fault_lasts_until_the_same_request_succeeds(fault: str) -> None:
    """A bucket that can be read and not written stays faulty, and the other way round."""
    bucket = Bucket()
    check = BucketCheck(bucket)
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
