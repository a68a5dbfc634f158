"""A trip file while it arrives: its unparsed bytes, the limits of parsing, and the errors of a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Final

import msgspec

VALUE_MAX_CHARACTERS: Final = 100
NUMBER_MAX_DIGITS: Final = 640
"""The longest run of digits in a number of any field, which Python converts under all of its settings."""


class ParserLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of parsing one file.

    `window_bytes` is the size of a window of the batch path. Decoding one holds the GIL for 0.2 ms. Above 256 KiB
    the trips exceed the processor's cache, and parsing gets slower. `record_bytes` limits a record, and the bytes
    before and after an array under a path. `depth` limits the nesting, including the array and the record itself.
    `retreats` is how often the batch path tries a shorter end of a window.
    """

    window_bytes: int = 128 * 1024
    record_bytes: int = 1024 * 1024
    depth: int = 64
    retreats: int = 4

    def __post_init__(self) -> None:
        """Refuse limits under which the two paths could give different results."""
        if not 0 < self.window_bytes <= self.record_bytes:
            raise ValueError("a window holds at least a byte and at most one longest record")
        if self.depth < 2 or self.retreats < 0:
            raise ValueError("a record is two deep, and there are no fewer retreats than none")


class BadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record that is JSON and breaks a rule.

    `record_number` counts from 1. `byte_offset` is the start of the record in the decoded file, from 0. `field` is
    ``None`` if the record is not an object. `value` is shortened.
    """

    record_number: int
    byte_offset: int | None
    field: str | None = None
    value: str | None = None
    reason: str

    def __str__(self) -> str:
        return _located(self)


class InvalidTripFile(ValueError):
    """The file is not a valid trip file, or it has too many bad records.

    `reason`, `record_number`, `byte_offset`, `field` and `value` describe the fault that ended the file, or its first
    bad record. All but the reason may be ``None``. `byte_offset` is the start of the unreadable record, or the nearest
    known place. `bad_records` counts the bad records as far as the file was read, and `reported` has the first.
    """

    def __init__(
        self,
        reason: str,
        *,
        byte_offset: int | None = None,
        record_number: int | None = None,
        field: str | None = None,
        value: str | None = None,
        bad_records: int = 0,
        reported: tuple[BadRecord, ...] = (),
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.byte_offset = byte_offset
        self.record_number = record_number
        self.field = field
        self.value = value
        self.bad_records = bad_records
        self.reported = reported

    def __str__(self) -> str:
        return _located(self)


class TooManyBadRecords(InvalidTripFile):
    """A file that was read to its end has more bad records than the rules allow."""

    def __init__(self, bad_records: int, reported: tuple[BadRecord, ...], *, records: int) -> None:
        first = reported[0]
        super().__init__(
            first.reason,
            byte_offset=first.byte_offset,
            record_number=first.record_number,
            field=first.field,
            value=first.value,
            bad_records=bad_records,
            reported=reported,
        )
        self.records = records

    def __str__(self) -> str:
        first = super().__str__()
        if self.bad_records == 1:
            return first
        return f"{self.bad_records:,} of {self.records:,} records are invalid; the first: {first}"


def _located(fault: BadRecord | InvalidTripFile) -> str:
    where = [] if fault.record_number is None else [f"record {fault.record_number}"]
    if fault.byte_offset is not None:
        where.append(f"byte {fault.byte_offset}")
    if fault.field is not None:
        where.append(f"field {fault.field!r}")
    if fault.value is not None:
        where.append(f"value {fault.value}")
    return f"{', '.join(where)}: {fault.reason}" if where else fault.reason


def shortened(value: object) -> str:
    """Return a value as Python writes it, in at most `VALUE_MAX_CHARACTERS`."""
    if isinstance(value, Decimal):
        text = str(value)
    else:
        text = repr(value[:VALUE_MAX_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= VALUE_MAX_CHARACTERS else text[: VALUE_MAX_CHARACTERS - 1] + "…"


class FileFault(Exception):
    """A fault that ends a file, before its place is known. `reason` is as in `InvalidTripFile`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


WHITE_SPACE: Final = re.compile(rb"[ \t\r\n]*")


class UnparsedBytes:
    """The bytes of a file that are not parsed yet: `pending`, which start at `offset`, and the bytes from `read`.

    `inside` is true after the first record: then a separator or the end of the records follows.
    """

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self.pending = bytearray()
        self.offset = 0
        self.ended = False
        self.inside = False

    def fill(self, size_bytes: int) -> None:
        """Read until `size_bytes` are pending, or the file ends."""
        while not self.ended and len(self.pending) < size_bytes:
            chunk = self._read()
            self.pending += chunk
            self.ended = not chunk

    def peek(self, skipped: re.Pattern[bytes] = WHITE_SPACE) -> bytes:
        """Skip white space, or another pattern. Return the next byte, or ``b""`` at the end."""
        while True:
            match = skipped.match(self.pending)
            assert match is not None
            if match.end():
                self.drop(match.end())
            if self.pending or self.ended:
                return bytes(self.pending[:1])
            self.fill(1)

    def drop(self, size_bytes: int) -> None:
        """Drop the first `size_bytes` of the pending bytes."""
        del self.pending[:size_bytes]
        self.offset += size_bytes


_STRIDE: Final = NUMBER_MAX_DIGITS // 2
_TWO_DIGITS = re.compile(rb"[0-9](?=[0-9])")


def may_have_long_number(data: bytes) -> bool:
    """Tell whether a run of digits may be longer than `NUMBER_MAX_DIGITS`. ``False`` is certain.

    The test samples one byte per stride: a run of that length covers two neighbouring samples and the bytes between.
    """
    return any(
        data[match.start() * _STRIDE : (match.start() + 1) * _STRIDE].isdigit()
        for match in _TWO_DIGITS.finditer(data[::_STRIDE])
    )
