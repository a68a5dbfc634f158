"""The container of the records in a file: skipped before the first record, and checked after the last.

If the records are under a path, the container is a JSON document with an empty array in place of the records. A
scan of brackets and quotes finds the start of the array, and the JSON parser then confirms it.
"""

from __future__ import annotations

import re
from typing import Final, NoReturn, Protocol

import msgspec

from services.ingest.parsing.json_events import json_events
from services.ingest.parsing.record_reader import FIRST_LOOK_BYTES, value_end
from services.ingest.parsing.trip_file import FileFault, ParserLimits, UnparsedBytes, shortened
from shared.domain.file_rules import RecordsForm, pointer

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_ELSEWHERE: Final = "TRIPFOLD_INGEST_RECORDS says where else the records are"
_ENTERED: Final = "the array of trips begins"


class Container(Protocol):
    """The container of one form of file."""

    def enter(self) -> None:
        """Advance to the first record. Raises `FileFault`."""

    def leave(self) -> None:
        """Advance from the end of the last record to the end of the file. Raises `FileFault`."""


def make_container(unparsed: UnparsedBytes, form: RecordsForm, limits: ParserLimits) -> Container:
    """Return the container of a form of file."""
    if form.is_lines:
        return _Lines(unparsed)
    return _Document(unparsed, form.path, limits) if form.path else _Array(unparsed)


def _pass_byte_order_mark(unparsed: UnparsedBytes) -> None:
    unparsed.fill(len(_BYTE_ORDER_MARK))
    if unparsed.pending.startswith(_BYTE_ORDER_MARK):
        unparsed.drop(len(_BYTE_ORDER_MARK))


class _Lines:
    """No container except a byte order mark."""

    def __init__(self, unparsed: UnparsedBytes) -> None:
        self._unparsed = unparsed

    def enter(self) -> None:
        _pass_byte_order_mark(self._unparsed)

    def leave(self) -> None:
        pass


class _Array:
    """The brackets of an array that is the whole document."""

    def __init__(self, unparsed: UnparsedBytes) -> None:
        self._unparsed = unparsed

    def enter(self) -> None:
        _pass_byte_order_mark(self._unparsed)
        first = self._unparsed.peek()
        if not first:
            raise FileFault("empty document")
        if first == b"{":
            raise FileFault(f"expected an array of trips, got an object; {_ELSEWHERE}")
        if first != b"[":
            raise FileFault(f"expected an array of trips, got {shortened(first)}")
        self._unparsed.drop(1)

    def leave(self) -> None:
        self._unparsed.drop(1)
        if self._unparsed.peek():
            raise FileFault("something follows the array of trips")


class _Document:
    """An object that has the array under a path of keys."""

    def __init__(self, unparsed: UnparsedBytes, path: tuple[str, ...], limits: ParserLimits) -> None:
        self._unparsed = unparsed
        self._path = path
        self._bytes_max = limits.record_bytes
        self._depth_max = limits.depth
        self._before = b""

    def enter(self) -> None:
        _pass_byte_order_mark(self._unparsed)
        if not self._unparsed.peek():
            raise FileFault("empty document")
        end = self._find_array()
        self._before = bytes(self._unparsed.pending[:end])
        try:
            self._check(self._before, _ENTERED)
        except FileFault as fault:
            if fault.reason != _ENTERED:
                raise
        self._unparsed.drop(end)

    def leave(self) -> None:
        self._unparsed.fill(self._bytes_max + 1)
        after = bytes(self._unparsed.pending[: self._bytes_max])
        too_long = None
        if len(self._unparsed.pending) > self._bytes_max:
            too_long = f"more than {self._bytes_max} bytes follow the array of trips"
        self._check(self._before + after, too_long)
        self._unparsed.drop(len(after))

    def _find_array(self) -> int:
        """Return the offset after the array's opening bracket. Raises `FileFault` if there is no array."""
        look_bytes = FIRST_LOOK_BYTES
        while True:
            self._unparsed.fill(min(look_bytes, self._bytes_max + 1))
            end = _array_under(self._path, self._unparsed.pending)
            if end is not None and end <= self._bytes_max:
                return end
            if self._unparsed.ended or len(self._unparsed.pending) > self._bytes_max:
                self._refuse()
            look_bytes *= 2

    def _refuse(self) -> NoReturn:
        before = bytes(self._unparsed.pending[: self._bytes_max])
        too_long = None
        if len(self._unparsed.pending) > self._bytes_max:
            too_long = f"{pointer(self._path)} does not begin within the first {self._bytes_max} bytes"
        self._check(before, too_long)
        raise FileFault(f"there is no {pointer(self._path)} by its plain name")

    def _check(self, document: bytes, unfinished: str | None = None) -> None:
        """Raise `FileFault` unless this is a document with an array at the path. Always raise if it is unfinished."""
        walk = _PathFollower(self._path, self._depth_max)
        for event, value in json_events(document, unfinished):
            walk.step(event, value)
        walk.end()
        # The parser would ignore an unfinished token there, such as `"` or `tru`.
        end, _ = value_end(document, self._depth_max, ended=True)
        if document[end:].strip(b" \t\r\n"):
            raise FileFault("something follows the document")


class _PathFollower:
    """Follows the path through the events of a document. Each key of the path must occur exactly once."""

    def __init__(self, path: tuple[str, ...], depth_max: int) -> None:
        self._path = path
        self._depth_max = depth_max
        self._depth = 0
        self._inside = 0
        self._seen = 0
        self._awaited = True

    def step(self, event: str, value: object) -> None:
        """Take the next event. Raises `FileFault`."""
        if self._awaited:
            self._expect_container(event)
            self._awaited = False
        elif event == "map_key":
            self._awaited = self._is_next_key(value)
        if event.startswith("start_"):
            self._depth += 1
            if self._depth > self._depth_max:
                raise FileFault(f"values are nested deeper than {self._depth_max}")
        elif event.startswith("end_"):
            self._depth -= 1
            self._inside = min(self._inside, self._depth)

    def end(self) -> None:
        """Take the end of the document. Raises `FileFault`."""
        if self._seen < len(self._path):
            raise FileFault(f"there is no {pointer(self._path[: self._seen + 1])}; {_ELSEWHERE}")

    def _expect_container(self, event: str) -> None:
        wanted = "start_array" if self._inside == len(self._path) else "start_map"
        if event != wanted:
            what = "an array of trips" if wanted == "start_array" else "an object"
            where = f" at {pointer(self._path[: self._inside])}" if self._inside else ""
            raise FileFault(f"expected {what}{where}, got {_NAMES[event]}; {_ELSEWHERE}")
        self._inside += 1

    def _is_next_key(self, key: object) -> bool:
        level = self._inside - 1
        if self._depth != self._inside or level >= len(self._path) or key != self._path[level]:
            return False
        if level < self._seen:
            raise FileFault(f"there is more than one {pointer(self._path[: level + 1])}")
        self._seen = level + 1
        return True


_NAMES: Final = {
    "start_map": "an object",
    "start_array": "an array",
    "string": "a string",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}

_TOKEN = re.compile(rb'[{}\[\],:]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


def _array_under(path: tuple[str, ...], data: bytearray) -> int | None:
    """Return the offset after the opening bracket of the array under the path, or None if it is not in the data."""
    depth = inside = 0
    awaited = True
    string = b""
    for token in _TOKEN.finditer(data):
        mark = token[0]
        if mark == b":":
            awaited = depth == inside and 0 < inside <= len(path) and _is_key(string, path[inside - 1])
        elif mark in b"{[":
            if awaited and mark == b"[" and inside == len(path):
                return token.end()
            depth += 1
            inside += awaited and mark == b"{"
            awaited = False
        elif mark in b"}]":
            depth -= 1
            inside = min(inside, depth)
            awaited = False
        elif mark == b",":
            awaited = False
        else:
            string = mark
    return None


def _is_key(string: bytes, key: str) -> bool:
    try:
        return bool(msgspec.json.decode(string) == key)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
