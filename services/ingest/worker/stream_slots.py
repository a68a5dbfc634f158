"""Limits how many files a worker streams at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from shared.runtime import metrics


class NoFreeSlot(Exception):  # no error: the stream then waits without an open response
    """No slot became free in time."""


class StreamSlots:
    """The slots of one worker. A waiting stream gets its slot in the order of asking.

    Streams of background tasks hold at most ``background`` of them.
    """

    def __init__(self, count: int, *, background: int = 1) -> None:
        self._slots = asyncio.Semaphore(count)
        self._background = asyncio.Semaphore(background)

    @contextlib.asynccontextmanager
    async def hold(self, *, wait_max_s: float | None = None, background: bool = False) -> AsyncIterator[None]:
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
