"""Cuts a file into records by its brackets and quotes.

If the file is JSON, each record is a JSON value. If it is not, some record is not a JSON value, or a comma is missing
between two of them. So a caller that parses every record has checked the whole array. ijson would find the records too,
but without their byte offsets, which error reports name.
"""

from __future__ import annotations

import enum
import re
from typing import Final, NamedTuple, Protocol

from services.ingest.parsing.trip_file import FileFault, ParserLimits, UnparsedBytes

FIRST_LOOK_BYTES: Final = 16 * 1024

_FLAT = rb'(\{(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+\})'
_FLAT_OBJECT = re.compile(_FLAT, re.DOTALL)
_COMMA_AND_FLAT_OBJECT = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+" + _FLAT, re.DOTALL)
_LINE_OF_FLAT_OBJECT = re.compile(rb"[ \t\r]*+\n[ \t\r\n]*+" + _FLAT, re.DOTALL)
_BRACKET_OR_STRING = re.compile(rb'[{}\[\]]|"(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_OTHER_VALUE = re.compile(rb'.[^ \t\r\n,:"{}\[\]]*', re.DOTALL)
_QUOTE: Final = ord('"')
_OPENERS: Final = frozenset(b"{[")
_IN_LINE = re.compile(rb"[ \t\r]*")


class RecordText(NamedTuple):
    """The text of a record and its byte offset. If `unfinished`, the text was cut for that reason."""

    offset: int
    text: bytes
    unfinished: str | None = None


class RecordReader(Protocol):
    """Takes the records of one form of file."""

    def take(self) -> RecordText | None:
        """Take the next record, or return ``None`` where the records end. Raises `FileFault`."""


class ArrayRecords:
    """The records of an array. `unparsed` starts after its ``[`` or after a record; its ``]`` is not taken."""

    def __init__(self, unparsed: UnparsedBytes, limits: ParserLimits) -> None:
        self._unparsed = unparsed
        self._limits = limits

    def take(self) -> RecordText | None:
        """Take the next record, or return ``None`` at the end of the array. Raises `FileFault`."""
        return _take_flat(self._unparsed, self._limits, _COMMA_AND_FLAT_OBJECT) or self._take_any()

    def _take_any(self) -> RecordText | None:
        first = self._unparsed.peek()
        if first == b"]":
            return None
        if self._unparsed.inside and first:
            if first != b",":
                raise FileFault("not JSON: expected a comma or the end of the array")
            self._unparsed.drop(1)
            first = self._unparsed.peek()
        if not first:
            raise FileFault("the file ends inside its array of trips")
        if first in b",]":
            raise FileFault("not JSON: expected a value in the array")
        return _take_value(self._unparsed, self._limits)


class LineRecords:
    """The records of a file with one record per line. Blank lines are skipped."""

    def __init__(self, unparsed: UnparsedBytes, limits: ParserLimits) -> None:
        self._unparsed = unparsed
        self._limits = limits

    def take(self) -> RecordText | None:
        """Take the record of the next line, or return ``None`` at the end of the file. Raises `FileFault`."""
        record = _take_flat(self._unparsed, self._limits, _LINE_OF_FLAT_OBJECT) or self._take_any()
        if record is None or b"\n" not in record.text:
            return record
        return RecordText(record.offset, record.text[: record.text.index(b"\n")], "the line ends inside a record")

    def _take_any(self) -> RecordText | None:
        if self._unparsed.inside and self._unparsed.peek(_IN_LINE) not in {b"", b"\n"}:
            raise FileFault("something follows a record in its line")
        if not self._unparsed.peek():
            return None
        return _take_value(self._unparsed, self._limits)


class ValueEnd(enum.Enum):
    """The result of the search for the end of a value."""

    WHOLE = enum.auto()
    OPEN = enum.auto()
    TOO_DEEP = enum.auto()


def _take_flat(unparsed: UnparsedBytes, limits: ParserLimits, following: re.Pattern[bytes]) -> RecordText | None:
    """Take the next record if it is a short flat object in the pending bytes, as most records are."""
    match = following.match(unparsed.pending, 0, FIRST_LOOK_BYTES) if unparsed.inside else None
    if match is None or len(match[1]) > limits.record_bytes:
        return None
    record = RecordText(unparsed.offset + match.start(1), match[1])
    unparsed.drop(match.end())
    return record


def _take_value(unparsed: UnparsedBytes, limits: ParserLimits) -> RecordText:
    end, ending = _find_value_end(unparsed, limits)
    unfinished = None
    if end > limits.record_bytes:
        end = limits.record_bytes
        unfinished = f"a record is longer than {limits.record_bytes} bytes"
    elif ending is ValueEnd.TOO_DEEP:
        unfinished = f"values are nested deeper than {limits.depth}"
    elif ending is ValueEnd.OPEN:
        unfinished = "the file ends inside a record"
    record = RecordText(unparsed.offset, bytes(unparsed.pending[:end]), unfinished)
    unparsed.drop(end)
    unparsed.inside = True
    return record


def _find_value_end(unparsed: UnparsedBytes, limits: ParserLimits) -> tuple[int, ValueEnd]:
    """Find the end of the value at the start of the pending bytes, and read more bytes as needed.

    Each search starts again with twice as many bytes, so all searches together cost at most twice the last one.
    """
    look_bytes = FIRST_LOOK_BYTES
    while True:
        unparsed.fill(min(look_bytes, limits.record_bytes + 1))
        end, ending = value_end(unparsed.pending, limits.depth - 1, ended=unparsed.ended)
        if ending is not ValueEnd.OPEN or unparsed.ended or end > limits.record_bytes:
            return end, ending
        look_bytes *= 2


def value_end(data: bytearray | bytes, depth_max: int, *, ended: bool) -> tuple[int, ValueEnd]:
    """Return the end of the value at the start of the data. `ended` says that no more data follows."""
    opening = data[:1]
    if opening == b"{" and (flat := _FLAT_OBJECT.match(data, 0, FIRST_LOOK_BYTES)):
        return flat.end(), ValueEnd.WHOLE
    if opening in (b"{", b"["):
        return _container_end(data, depth_max)
    match = (_STRING if opening == b'"' else _OTHER_VALUE).match(data)
    if match is None or (match.end() == len(data) and opening != b'"' and not ended):
        return len(data), ValueEnd.OPEN
    return match.end(), ValueEnd.WHOLE


def _container_end(data: bytearray | bytes, depth_max: int) -> tuple[int, ValueEnd]:
    depth = 0
    for token in _BRACKET_OR_STRING.finditer(data):
        first = data[token.start()]
        if first == _QUOTE:
            if not token[1]:
                break
        elif first in _OPENERS:
            depth += 1
            if depth > depth_max:
                return token.end(), ValueEnd.TOO_DEEP
        else:
            depth -= 1
            if depth == 0:
                return token.end(), ValueEnd.WHOLE
    return len(data), ValueEnd.OPEN
