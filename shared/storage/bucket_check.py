"""Checks whether a bucket can be used, by one small request at a time."""

from __future__ import annotations

from typing import Protocol

from shared.storage.object_store import ObjectStore
from shared.storage.schema_switch import adopt_written_version


class WriteChecked(ObjectStore, Protocol):
    """A bucket whose right to write can be checked without a write."""

    async def check(self) -> None:
        """Raise StoreUnavailable if the bucket cannot be written."""


class BucketCheck:
    """Reads an object, and at the next call tries a write (`shared.storage.conditional_writes`). The first does both.

    A check that failed is repeated by the next call. So a fault lasts until the request that failed succeeds.
    """

    def __init__(self, store: WriteChecked) -> None:
        self._store = store
        self._passed = self._writes = False

    async def __call__(self) -> None:
        """Raise StoreUnavailable, or WrongSchemaVersion if this build cannot write the version of the bucket."""
        if not (self._passed and self._writes):
            await adopt_written_version(self._store)
        if self._writes or not self._passed:
            await self._store.check()
        self._writes = self._passed and not self._writes
        self._passed = True
