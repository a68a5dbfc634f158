"""A part of an upload, as the S3 client and the HTTP client below it take it without copying it.

Given bytes, they copy each part twice on its way to the socket, into memory that the kernel has to clear first: that
costs more than sending it. So a part is a payload that the HTTP client asks to write itself, and at the same time a
file, for that is how the S3 client reads what it signs.
"""

from __future__ import annotations

import io

from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

WRITE_BYTES = 256 * 1024
"""Written at once. The first write is copied, together with the head of the request."""


class Part(Payload):
    """The bytes of one part. They must not change before the request that sends them has ended."""

    _value: memoryview

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        super().__init__(memoryview(data), content_type="application/json")
        self._size = self._value.nbytes
        self._position = 0

    def read(self, size_bytes: int = -1) -> memoryview:
        """Return the next bytes, as a file does, without copying them."""
        end = self._value.nbytes if size_bytes < 0 else min(self._position + size_bytes, self._value.nbytes)
        begin, self._position = self._position, end
        return self._value[begin:end]

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as in a file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._value.nbytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the place of the next read, as a file does."""
        return self._position

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        size_bytes = self._value.nbytes if content_length is None else min(content_length, self._value.nbytes)
        for begin in range(0, size_bytes, WRITE_BYTES):
            await writer.write(self._value[begin : min(begin + WRITE_BYTES, size_bytes)])
