"""Limits how many files a worker streams at the same time. A file whose parsing crashed workers gets all slots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class StreamSlots:
    """The slots of one worker. A waiting stream gets its slot in the order of asking."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._slots = asyncio.Semaphore(count)
        self._taking_all = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold one slot, when one is free."""
        async with self._slots:
            yield

    @contextlib.asynccontextmanager
    async def all(self) -> AsyncIterator[None]:
        """Hold all slots, when the other streams have ended."""
        # Two streams that each hold half of the slots would wait for each other.
        async with self._taking_all, contextlib.AsyncExitStack() as stack:
            for _ in range(self._count):
                await stack.enter_async_context(self._slots)
            yield
