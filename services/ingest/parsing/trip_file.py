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
    and with more than 256 KiB the trips outgrow the processor's cache and all is slower. `record_bytes` is the longest
    record, and the most that may stand before or after an array that lies under a path. `depth` is the deepest nesting,
    counting the array of records and the record itself, and `retreats` how often a window whose end was no record's
    end is cut shorter.
    """

    window_bytes: int = 128 * 1024
    record_bytes: int = 1024 * 1024
    depth: int = 64
    retreats: int = 4

    def __post_init__(self) -> None:
        """Refuse bounds under which the two paths could answer differently."""
        if not 0 < self.window_bytes <= self.record_bytes:
            raise ValueError("a window holds at least a byte and at most one longest record")
        if self.depth < 2 or self.retreats < 0:
            raise ValueError("a record is two deep, and there are no fewer retreats than none")


class BadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record that is JSON and breaks a rule.

    `record_number` counts from 1 and `byte_offset`, where the record begins, from 0, in the file as it was folded:
    without content-encoding. `field` is ``None`` if the record is no object; `value` is shortened.
    """

    record_number: int
    byte_offset: int | None
    field: str | None = None
    value: str | None = None
    reason: str

    def __str__(self) -> str:
        return _located(self)


class InvalidTripFile(ValueError):
    """The file, or some of its records, are not what a trip file may be.

    `reason`, `record_number`, `byte_offset`, `field` and `value` are those of what ended the file, or else of its
    first bad record; each but the reason may be ``None``. `byte_offset` is where the record begins that could not be
    read, or as near to the fault as is known. `bad_records` counts the records that are JSON and break a rule, as
    far as the file was read, and `reported` holds the first of them.
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
    """A file that was read to its end has more bad records than it may have; says how many of how many."""

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
    """What ends a file at once, before it is known where: `reason` as in `InvalidTripFile`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


WHITE_SPACE: Final = re.compile(rb"[ \t\r\n]*")


class UnparsedBytes:
    """The bytes of a file from where folding stands: `pending`, which begin at `offset`, and what `read` will give.

    `inside` says that records before `pending` are folded, so that what separates two records, or ends them, follows.
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

    def peek(self, passed_over: re.Pattern[bytes] = WHITE_SPACE) -> bytes:
        """Drop white space, or what else may be passed over; return the next byte, or ``b""`` at the end."""
        while True:
            match = passed_over.match(self.pending)
            assert match is not None
            if match.end():
                self.drop(match.end())
            if self.pending or self.ended:
                return bytes(self.pending[:1])
            self.fill(1)

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
