"""A trip file as it arrives: the bytes that are not folded yet, the bounds on reading them, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Final

import msgspec

VALUE_MAX_CHARACTERS: Final = 100
NUMBER_MAX_DIGITS: Final = 640
"""The longest run of digits in a number of any field: what Python converts under each of its settings."""


class ParserLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of parsing one file.

    `window_bytes` is what the fast path decodes at once: for that long, 0.2 ms, the decoder holds the interpreter,
    and with more than 256 KiB the trips outgrow the processor's cache and all is slower. `piece_bytes` is what the
    reference path hands to its parser at once. `record_bytes` is the longest record, `depth` the deepest nesting,
    counting the array of records and the record itself, and `retreats` how often a window whose end was no record's
    end is cut shorter.
    """

    window_bytes: int = 128 * 1024
    piece_bytes: int = 16 * 1024
    record_bytes: int = 1024 * 1024
    depth: int = 64
    retreats: int = 4

    def __post_init__(self) -> None:
        """Refuse bounds under which the two paths could answer differently."""
        if not 0 < self.window_bytes <= self.record_bytes:
            raise ValueError("a window holds at least a byte and at most one longest record")
        if self.piece_bytes < 1 or self.depth < 2 or self.retreats < 0:
            raise ValueError("a piece holds at least a byte, and a record is two deep")


class InvalidTripFile(ValueError):
    """The file, or one record of it, is not what a trip file may be.

    `byte_offset` is where the record begins that could not be read, or as near to the fault as is known;
    `record_number` counts from 1; `value` is shortened. Each may be ``None``.
    """

    def __init__(
        self,
        reason: str,
        *,
        byte_offset: int | None = None,
        record_number: int | None = None,
        field: str | None = None,
        value: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.byte_offset = byte_offset
        self.record_number = record_number
        self.field = field
        self.value = value

    def __str__(self) -> str:
        where = [] if self.record_number is None else [f"record {self.record_number}"]
        if self.byte_offset is not None:
            where.append(f"byte {self.byte_offset}")
        if self.field is not None:
            where.append(f"field {self.field!r}")
        if self.value is not None:
            where.append(f"value {self.value}")
        return f"{', '.join(where)}: {self.reason}" if where else self.reason


def shortened(value: object) -> str:
    """Return a value as Python writes it, in at most `VALUE_MAX_CHARACTERS`."""
    if isinstance(value, Decimal):
        text = str(value)
    else:
        text = repr(value[:VALUE_MAX_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= VALUE_MAX_CHARACTERS else text[: VALUE_MAX_CHARACTERS - 1] + "…"


class UnfoldedBytes:
    """The bytes of a file from where folding stands: `pending`, which begin at `offset`, and what `read` will give.

    `inside` says that records before `pending` are folded, so that a comma or the end of the array follows.
    """

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self.pending = bytearray()
        self.offset = 0
        self.ended = False
        self.inside = False

    def fill(self, size_bytes: int) -> None:
        """Read until so many bytes are pending, or the file has ended."""
        while not self.ended and len(self.pending) < size_bytes:
            chunk = self._read()
            self.pending += chunk
            self.ended = not chunk

    def drop(self, size_bytes: int) -> None:
        """Go on after the first so many pending bytes."""
        del self.pending[:size_bytes]
        self.offset += size_bytes


_STRIDE: Final = NUMBER_MAX_DIGITS // 2
_TWO_DIGITS = re.compile(rb"[0-9](?=[0-9])")


def may_have_long_number(data: bytes) -> bool:
    """Tell whether some run of digits may be longer than `NUMBER_MAX_DIGITS`; ``False`` is certain.

    So long a run covers two neighbours of the bytes a stride apart, and all between them.
    """
    return any(
        data[match.start() * _STRIDE : (match.start() + 1) * _STRIDE].isdigit()
        for match in _TWO_DIGITS.finditer(data[::_STRIDE])
    )
