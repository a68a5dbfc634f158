"""Checks that a store refuses a write whose condition does not hold.

Every object with several writers is changed by compare-and-swap. A store that ignores the condition loses updates, and
nothing shows it. So no process makes a conditional write before the store has refused two writes of a small object: one
that may only create the object, although it exists, and one on an ETag that the object never has.

The second write also checks whether the bucket can be written. The store must authorize a write before it refuses the
condition. So the check finds missing rights, refused credentials and a store that cannot be reached. It stores nothing,
so it leaves no versions in a bucket with versions. It does not find a full disk; the next write does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from shared.domain import keys
from shared.storage.object_store import CasConflict, StoreUnavailable

Swap = Callable[[str, bytes, str | None], Awaitable[str]]
"""Writes an object if its ETag is still the given one (None: if it does not exist). Raises CasConflict otherwise."""

BODY: Final = b"{}"
NEVER_AN_ETAG: Final = f'"{"0" * 32}"'


class UnsafeStore(StoreUnavailable):
    """The store ignores the conditions of writes. The message names the store, the header and the remedy."""


class ConditionalWrites:
    """The conditional writes of one store, made by ``swap``. ``name`` names the store in errors."""

    def __init__(self, name: str, swap: Swap) -> None:
        self._name = name
        self._swap = swap
        self._created = self._keeps_existing = self._proven = False
        self._proving = asyncio.Lock()

    async def require(self) -> None:
        """Raise UnsafeStore if the store ignores conditions. It is asked once, by two or three requests."""
        if self._proven:
            return
        async with self._proving:
            while not self._proven:
                await self._prove_next()

    async def check_next(self) -> bool:
        """Make the next request of `require`, or its last one again. Return whether the store has proven all.

        Raises StoreUnavailable if the bucket cannot be written. What the store has proven before stays proven.
        """
        async with self._proving:
            await self._prove_next()
            return self._proven

    async def _prove_next(self) -> None:
        if self._keeps_existing:
            self._proven = await self._is_refused(NEVER_AN_ETAG)
            if not self._proven:
                self._created = self._keeps_existing = False
                raise self._unsafe("If-Match")
        elif await self._is_refused(None):
            self._keeps_existing = True
        elif self._created:
            raise self._unsafe("If-None-Match")
        else:
            self._created = True

    async def _is_refused(self, etag: str | None) -> bool:
        try:
            await self._swap(keys.WRITE_CHECK, BODY, etag)
        except CasConflict:
            return True
        return False

    def _unsafe(self, header: str) -> UnsafeStore:
        return UnsafeStore(
            f"{self._name} ignores {header}: concurrent writers would lose each other's changes. Use a store with "
            f"conditional writes, and no proxy that removes {header}; 'tripfold doctor' checks them"
        )
