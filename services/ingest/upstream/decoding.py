"""Decodes content-encodings in steps of bounded memory and work: gzip, deflate, br and zstd.

The HTTP client's own decoders are not used. They inflate a whole packet at once, and accept a body that ends inside
its compressed stream.

A small input can cost much work and yield nothing: 128 KiB hold 14,000 empty zstd frames, and each costs up to 40 µs.
So one step takes little input and makes few calls of the library. The caller lets the event loop run after each step.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Final, Protocol

import brotli

from shared.runtime import zstd

ACCEPTED: Final = "gzip, deflate, br, zstd"
INPUT_BYTES_MAX: Final = 8 * 1024
"""The largest input of one call."""

BROTLI_INPUT_BYTES_MAX: Final = 2 * 1024
"""The same for brotli, whose headers can cost 1 µs a byte, ten times as much as those of other codings."""

OUTPUT_BYTES_MAX: Final = 64 * 1024
"""The largest output of one call."""

CALLS_MAX: Final = 4
"""The most calls in one step. Each gzip member and each zstd frame needs a call of its own, however short it is."""

ZSTD_WINDOW_LOG_MAX: Final = 23
"""8 MiB: what RFC 9659 allows a content-coding."""

_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_DEFLATE: Final = -zlib.MAX_WBITS


class BadCoding(ValueError):
    """The bytes are not what the content-coding says, or end before their stream does."""


class UnknownCoding(ValueError):
    """A content-coding that was not asked for."""


class _Coding(Protocol):
    """The stream of one content-coding. Both methods raise BadCoding."""

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield the output of each call of the library, even if it is empty. Exhaust it before the next data."""

    def finish(self) -> None:
        """Check that the stream has come to its end."""


class Decoder:
    """Undoes one content-coding. Both methods raise BadCoding."""

    def __init__(self, coding: _Coding, *, input_bytes_max: int = INPUT_BYTES_MAX) -> None:
        self._coding = coding
        self._input_bytes_max = input_bytes_max

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield after each step of work on ``data``, and exhaust it before the next data.

        A step yields nothing until some output is together, because many tiny chunks would be work for the caller.
        """
        made: list[bytes] = []
        made_bytes = 0
        for start in range(0, len(data), self._input_bytes_max):
            calls = self._coding.decode(data[start : start + self._input_bytes_max])
            while step := list(itertools.islice(calls, CALLS_MAX)):
                made += step
                made_bytes += sum(map(len, step))
                if made_bytes < OUTPUT_BYTES_MAX:
                    yield b""
                else:
                    yield b"".join(made)
                    made, made_bytes = [], 0
        yield b"".join(made)

    def finish(self) -> None:
        """Check that the stream has come to its end."""
        self._coding.finish()


def decoder_of(coding: str) -> Decoder | None:
    """Return the decoder for a ``Content-Encoding``, None if there is nothing to undo; raise UnknownCoding."""
    match coding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip":
            return Decoder(_Zlib(_GZIP_OR_ZLIB))
        case "deflate":
            return Decoder(_Deflate())
        case "br":
            return Decoder(_Brotli(), input_bytes_max=BROTLI_INPUT_BYTES_MAX)
        case "zstd":
            return Decoder(_Zstandard())
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
                piece = self._stream.decompress(data, OUTPUT_BYTES_MAX)
                self._begun = True
                data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
                yield piece
                while not self._stream.eof and not data and len(piece) == OUTPUT_BYTES_MAX:
                    # All input is taken, and more may still be inside.
                    piece = self._stream.decompress(b"", OUTPUT_BYTES_MAX)
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
            piece = self._stream.process(data, output_buffer_limit=OUTPUT_BYTES_MAX)
            yield piece
            while piece or not (self._stream.is_finished() or self._stream.can_accept_more_data()):
                piece = self._stream.process(b"", output_buffer_limit=OUTPUT_BYTES_MAX)
                yield piece
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
                piece = self._frame.decompress(data, OUTPUT_BYTES_MAX)
                self._begun = True
                data = self._frame.unused_data if self._frame.eof else b""
                yield piece
        except zstd.ZstdError as error:
            raise BadCoding(f"zstd: {error}") from error

    def finish(self) -> None:
        if self._begun and not self._frame.eof:
            raise BadCoding("the compressed stream ends too early")


def _zstd_frame() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX})
