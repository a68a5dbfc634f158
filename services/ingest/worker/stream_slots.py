"""Limits how many files a worker streams at the same time. A file whose parsing crashed workers gets all slots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from enum import Enum

from shared.runtime import metrics


class Slots(Enum):
    """How many slots a stream holds."""

    NONE = 0
    ONE = 1
    ALL = 2


class NoFreeSlot(Exception):  # no error: the stream then waits without an open response
    """No slot became free in time."""


class StreamSlots:
    """The slots of one worker. A waiting stream gets its slot in the order of asking.

    Streams of background tasks hold at most ``background`` of them.
    """

    def __init__(self, count: int, *, background: int = 1) -> None:
        self._count = count
        self._slots = asyncio.Semaphore(count)
        self._background = asyncio.Semaphore(background)
        self._taking_all = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def one(self, *, wait_max_s: float | None = None, background: bool = False) -> AsyncIterator[None]:
        """Hold one slot, when one is free. Raises NoFreeSlot after ``wait_max_s`` seconds."""
        async with contextlib.AsyncExitStack() as held:
            try:
                with metrics.time_stage("wait"):
                    async with asyncio.timeout(wait_max_s):
                        if background:
                            await held.enter_async_context(self._background)
                        await held.enter_async_context(self._slots)
            except TimeoutError:
                raise NoFreeSlot from None
            yield

    @contextlib.asynccontextmanager
    async def all(self) -> AsyncIterator[None]:
        """Hold all slots, when the other streams have ended."""
        # Two streams that each hold half of the slots would wait for each other.
        async with self._taking_all, contextlib.AsyncExitStack() as stack:
            for _ in range(self._count):
                await stack.enter_async_context(self._slots)
            yield

    def hold(self, slots: Slots, *, background: bool = False) -> contextlib.AbstractAsyncContextManager[None]:
        """Hold none, one or all of the slots."""
        if slots is Slots.ALL:
            return self.all()
        return self.one(background=background) if slots is Slots.ONE else contextlib.nullcontext()
