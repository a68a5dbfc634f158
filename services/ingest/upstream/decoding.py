"""Decodes content-encodings in bounded memory: gzip, deflate, br and zstd, one piece at a time.

The HTTP client's own decoders are not used. They inflate a whole packet at once, and accept a body that ends inside
its compressed stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final, Protocol

import brotli

from shared.runtime import zstd

ACCEPTED: Final = "gzip, deflate, br, zstd"
PIECE_BYTES: Final = 256 * 1024
ZSTD_WINDOW_LOG_MAX: Final = 23
"""8 MiB: what RFC 9659 allows a content-coding."""

_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_DEFLATE: Final = -zlib.MAX_WBITS


class BadCoding(ValueError):
    """The bytes are not what the content-coding says, or end before their stream does."""


class UnknownCoding(ValueError):
    """A content-coding that was not asked for."""


class Decoder(Protocol):
    """Undoes one content-coding. Both methods raise BadCoding."""

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield what ``data`` adds, in pieces of bounded size; take them all before the next call."""

    def finish(self) -> None:
        """Check that the stream has come to its end."""


def decoder_of(coding: str) -> Decoder | None:
    """Return the decoder for a ``Content-Encoding``, None if there is nothing to undo; raise UnknownCoding."""
    match coding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip":
            return _Zlib(_GZIP_OR_ZLIB)
        case "deflate":
            return _Deflate()
        case "br":
            return _Brotli()
        case "zstd":
            return _Zstandard()
        case _:
            raise UnknownCoding(f"content-encoding {coding[:100]!r}; {ACCEPTED} or none are taken")


class _Zlib:
    """One or several gzip members, or one zlib or raw deflate stream."""

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._stream = zlib.decompressobj(wbits)
        self._begun = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                if self._stream.eof:
                    if self._wbits != _GZIP_OR_ZLIB:
                        raise BadCoding("bytes after the end of the stream")
                    self._stream = zlib.decompressobj(self._wbits)
                piece = self._stream.decompress(data, PIECE_BYTES)
                self._begun = True
                data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
                if piece:
                    yield piece
                while not self._stream.eof and not data and len(piece) == PIECE_BYTES:
                    # All input is taken, and more may still be inside.
                    piece = self._stream.decompress(b"", PIECE_BYTES)
                    if piece:
                        yield piece
        except zlib.error as error:
            raise BadCoding(str(error)) from error

    def finish(self) -> None:
        if self._begun and not self._stream.eof:
            raise BadCoding("the compressed stream ends too early")


class _Deflate:
    """``deflate`` as it is written: in a zlib stream, or by servers that misread the standard without one."""

    def __init__(self) -> None:
        self._head = b""
        self._stream: _Zlib | None = None

    def decode(self, data: bytes) -> Iterator[bytes]:
        if self._stream is None:
            self._head += data
            if len(self._head) < 2:
                return
            data, self._head = self._head, b""
            # The two bytes of a zlib header are a multiple of 31, with 8 in the lower half of the first.
            is_zlib = data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0
            self._stream = _Zlib(zlib.MAX_WBITS if is_zlib else _DEFLATE)
        yield from self._stream.decode(data)

    def finish(self) -> None:
        if self._stream is not None:
            self._stream.finish()
        elif self._head:
            raise BadCoding("the compressed stream ends too early")


class _Brotli:
    def __init__(self) -> None:
        self._stream = brotli.Decompressor()
        self._begun = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        self._begun = self._begun or bool(data)
        try:
            if data and self._stream.is_finished():
                raise BadCoding("bytes after the end of the stream")
            piece = self._stream.process(data, output_buffer_limit=PIECE_BYTES)
            while True:
                if piece:
                    yield piece
                elif self._stream.is_finished() or self._stream.can_accept_more_data():
                    return
                piece = self._stream.process(b"", output_buffer_limit=PIECE_BYTES)
        except brotli.error as error:
            raise BadCoding(f"brotli: {error}") from error

    def finish(self) -> None:
        if self._begun and not self._stream.is_finished():
            raise BadCoding("the compressed stream ends too early")


class _Zstandard:
    """One or several frames."""

    def __init__(self) -> None:
        self._frame = _zstd_frame()
        self._begun = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        try:
            while data or not (self._frame.needs_input or self._frame.eof):
                if self._frame.eof:
                    self._frame = _zstd_frame()
                piece = self._frame.decompress(data, PIECE_BYTES)
                self._begun = True
                data = self._frame.unused_data if self._frame.eof else b""
                if piece:
                    yield piece
        except zstd.ZstdError as error:
            raise BadCoding(f"zstd: {error}") from error

    def finish(self) -> None:
        if self._begun and not self._frame.eof:
            raise BadCoding("the compressed stream ends too early")


def _zstd_frame() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX})
