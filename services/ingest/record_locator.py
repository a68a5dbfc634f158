"""Follows where records begin and end, by bracket and quote, in bytes that a JSON parser reads as well.

Alone it would prove nothing: of bytes that are not JSON it tells nonsense. The reference path asks it where a
record began, how long records are and whether a byte is inside a string, because its parser does not say.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BETWEEN_RECORDS = re.compile(rb"[ \t\r\n,]*")
_BRACKET_OR_QUOTE = re.compile(rb'["{}\[\]]')
_STRING_CONTENT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_WHITE_SPACE = b" \t\r\n"


class Located(NamedTuple):
    """A record's place among those counted, where it begins and how much of it has been scanned."""

    record: int
    offset: int
    size_bytes: int


class RecordLocator:
    """Where the records of an array are; begins between two of them, at a byte offset and the next one's place."""

    def __init__(self, offset: int, *, record: int) -> None:
        self.began = offset
        self.offset = offset
        self.longest = Located(record, offset, 0)
        self.in_string = False
        self.array_end: int | None = None
        self.more_after_array = False
        self._first_record = record
        self._starts: list[int] = []
        self._inside = False
        self._depth = 0
        self._escaped = False

    def scan(self, data: bytes) -> None:
        """Go on over the next bytes of the file."""
        position = 0
        while position < len(data):
            if self.array_end is not None:
                self.more_after_array |= bool(data[position:].strip(_WHITE_SPACE))
                break
            position = (self._scan_record if self._inside else self._scan_between)(data, position)
        self.offset += len(data)
        if self._inside:
            self._measure(self.offset)

    def start_of(self, record: int) -> int | None:
        """Return the offset of a record, if it has been seen to begin and is not forgotten."""
        index = record - self._first_record
        return self._starts[index] if 0 <= index < len(self._starts) else None

    def forget_before(self, record: int) -> None:
        """Forget where earlier records began."""
        del self._starts[: record - self._first_record]
        self._first_record = record

    def _scan_between(self, data: bytes, position: int) -> int:
        match = _BETWEEN_RECORDS.match(data, position)
        assert match is not None
        position = match.end()
        if position == len(data):
            return position
        if data[position] == ord("]"):
            self.array_end = self.offset + position + 1
            return position + 1
        self._starts.append(self.offset + position)
        self._inside = True
        self._depth = int(data[position] in b"{[")
        return position + self._depth

    def _scan_record(self, data: bytes, position: int) -> int:
        if self._escaped:
            self._escaped = False
            return position + 1
        if self.in_string:
            return self._scan_string(data, position)
        match = _BRACKET_OR_QUOTE.search(data, position)
        if match is None:
            return len(data)
        character = match[0]
        if character == b'"':
            self.in_string = True
        elif character in b"{[":
            self._depth += 1
        else:
            # A value that is no record begins at depth 0 and so never ends here; its length is bounded all the same.
            self._depth -= 1
            if self._depth == 0:
                self._measure(self.offset + match.end())
                self._inside = False
        return match.end()

    def _scan_string(self, data: bytes, position: int) -> int:
        match = _STRING_CONTENT.match(data, position)
        assert match is not None
        position = match.end()
        if position == len(data):
            return position
        if data[position] == ord('"'):
            self.in_string = False
        else:
            self._escaped = True
        return position + 1

    def _measure(self, end: int) -> None:
        start = self._starts[-1]
        if end - start > self.longest.size_bytes:
            self.longest = Located(self._first_record + len(self._starts) - 1, start, end - start)
