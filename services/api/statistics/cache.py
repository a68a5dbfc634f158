"""Bodies of answers, each made once for all who ask for the same.

A strong ETag names the bytes, and it is computed anew for every query from what S3 holds at that moment. So a body that
is found under it is the one that would be made: nothing here is ever stale, and nothing has to go but for want of room.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator


class Body:
    """A body that is being made, however slowly its readers take it, or that is done."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.done = False
        self._parts: list[bytes] = []
        self._fault: Exception | None = None
        self._grown = asyncio.Condition()

    async def make(self, parts: Iterator[bytes]) -> None:
        """Take the parts in, beside the event loop. What that raises is for the readers."""
        try:
            async for part in beside_the_loop(parts):
                async with self._grown:
                    self._parts.append(part)
                    self.size_bytes += len(part)
                    self._grown.notify_all()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where somebody waits for the body
            self._fault = error
        async with self._grown:
            self.done = True
            self._grown.notify_all()

    @property
    def failed(self) -> bool:
        """Whether it could not be made."""
        return self._fault is not None

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the parts from the first on, as they come."""
        place = 0
        while True:
            async with self._grown:
                while place == len(self._parts) and not self.done:
                    await self._grown.wait()
            for part in self._parts[place:]:
                place += 1
                yield part
            if self.done and place == len(self._parts):
                break
        if self._fault is not None:
            raise self._fault

    async def whole(self) -> bytes:
        """Return all of it."""
        return b"".join([part async for part in self.parts()])


class ResponseCache:
    """The bodies that were asked for last. Those under way count with the size that is expected of them."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bodies: OrderedDict[str, Body] = OrderedDict()
        self._expected_bytes: dict[str, int] = {}
        self._making: set[asyncio.Task[None]] = set()

    def find(self, etag: str) -> Body | None:
        """Return the body under an ETag, or None if it has to be made."""
        body = self._bodies.get(etag)
        if body is not None:
            self._bodies.move_to_end(etag)
        return body

    def begin(self, etag: str, parts: Iterator[bytes], *, expected_bytes: int) -> Body | None:
        """Begin to make a body out of its parts; None, and nothing is taken of them, if there is no room for it."""
        if not self._has_room(expected_bytes):
            return None
        body = self._bodies[etag] = Body()
        self._expected_bytes[etag] = expected_bytes
        task = asyncio.create_task(self._make(etag, body, parts))
        self._making.add(task)
        task.add_done_callback(self._making.discard)
        return body

    async def _make(self, etag: str, body: Body, parts: Iterator[bytes]) -> None:
        await body.make(parts)
        del self._expected_bytes[etag]
        if body.failed or not self._has_room(0):
            self._bodies.pop(etag, None)

    def _has_room(self, wanted_bytes: int) -> bool:
        """Let the bodies go that were used least recently, until there is room or only those under way are left."""
        taken_bytes = sum(self._expected_bytes.get(etag, body.size_bytes) for etag, body in self._bodies.items())
        for etag in [etag for etag in self._bodies if etag not in self._expected_bytes]:
            if taken_bytes + wanted_bytes <= self._bytes_max:
                break
            taken_bytes -= self._bodies.pop(etag).size_bytes
        return taken_bytes + wanted_bytes <= self._bytes_max


async def beside_the_loop(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield parts that each take long enough to make to hold up the event loop."""
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part
