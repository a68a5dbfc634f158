"""Checks whether a bucket can be used, by one small request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol, TypeVar

from shared.storage.object_store import ObjectStore, StoreUnavailable
from shared.storage.schema_switch import adopt_written_version

_Result = TypeVar("_Result")


class WriteChecked(ObjectStore, Protocol):
    """A bucket whose right to write can be checked without a write."""

    async def check_next(self) -> bool:
        """Make the next request of the check. Return whether it is complete; raise StoreUnavailable if it fails."""


class BucketCheck:
    """Reads an object, and at the next call tries a write (`shared.storage.conditional_writes`). The first does both.

    ``timeout_s`` limits each request, not their sum. A check that failed goes on with the request that failed. So a
    slow bucket passes in the end, and a fault lasts until the request that failed succeeds.
    """

    def __init__(self, store: WriteChecked, *, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._passed = self._writes = False

    async def __call__(self) -> None:
        """Raise StoreUnavailable, or WrongSchemaVersion if this build cannot write the version of the bucket."""
        if not self._writes:
            await self._in_time(adopt_written_version(self._store))
            self._writes = True
            if self._passed:
                return
        while not await self._in_time(self._store.check_next()):
            pass
        self._writes, self._passed = False, True

    async def _in_time(self, request: Awaitable[_Result]) -> _Result:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await request
        except TimeoutError as error:
            raise StoreUnavailable(f"S3 did not respond within {self._timeout_s:g} s") from error
