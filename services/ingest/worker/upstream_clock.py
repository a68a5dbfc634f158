"""Counts how long one attempt at a city-day waits for the upstream, and how long the upstream waits for this process.

Only the first time is the upstream's fault. The upstream waits while S3 takes the bytes, or while the machine is slow.
A server may close a connection that nobody reads, so a download that breaks off after such a wait is not its fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType

from services.ingest.upstream.errors import TransientUpstreamError
from shared.storage.object_store import StoreUnavailable

HELD_MAX_S = 10.0
"""How long an upstream must keep a connection open that nobody reads."""


class UpstreamClock:
    """The waits of one attempt. ``async with`` it around each wait for the upstream.

    Raises TransientUpstreamError when the waits together exceed ``deadline_s``.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = self._left_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._began_s = self._ended_s = self._loop.time()
        self._held_max_s = 0.0
        self._limit = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        self._began_s = self._loop.time()
        self._held_max_s = max(self._held_max_s, self._began_s - self._ended_s)
        self._limit = asyncio.timeout(self._left_s)
        await self._limit.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended_s = self._loop.time()
        self._left_s -= self._ended_s - self._began_s
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as timeout:
            raise TransientUpstreamError(
                f"the upstream took longer than TRIPFOLD_INGEST_DEADLINE_S allows, {self._deadline_s:g} s"
            ) from timeout

    def begin_request(self) -> None:
        """Note that a request begins: no connection has been left unread yet."""
        self._held_max_s = 0.0
        self._ended_s = self._loop.time()

    async def chunks(self, received: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """Yield what is received, and count the waits. Raises StoreUnavailable for a break after a long hold."""
        while True:
            try:
                async with self:
                    chunk = await anext(received, None)
            except TransientUpstreamError as error:
                if self._left_s <= 0 or self._held_max_s < HELD_MAX_S:
                    raise
                raise StoreUnavailable(
                    f"S3 or this machine was slow: the download was not read for {self._held_max_s:.0f} s, and then "
                    f"{error}"
                ) from error
            if chunk is None:
                return
            yield chunk
