"""The fast path: whole windows of records through one typed decoder.

A window is a stretch of the file that ends in ``}``. Between square brackets it is a document, decoded as an array of
trips; JSON is read from left to right, so if that succeeds the window is a run of whole records, wherever its end
came from. If it does not, the end was inside a string or a nested object, and an earlier ``}`` is tried.

This path never judges. Whatever it cannot read, or would read otherwise than the reference path, it declines:
it leaves the bytes unfolded, and the reference path goes on from there. It may therefore only accept what the
reference path accepts too, with the same sums, and these are the places where its decoder is not enough:

- it skips the fields it does not know, without looking at their UTF-8, their depth or the length of their numbers;
- what it does to a departure time, `DatedTrip` says.

Three decoders stand on a ladder: `PlainTrip` is the quickest and forbids other fields, `DatedTrip` skips them, and
`Trip` leaves the departure time to the rules. A file steps down when it brings a window that its decoder refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import msgspec

from services.ingest.tally import Tally
from services.ingest.trip_file import ParserLimits, UnfoldedBytes, may_have_long_number
from services.ingest.trips import DatedTrip, InvalidTrip, PlainTrip, Trip

_WHITE_SPACE = re.compile(rb"[ \t\r\n]*")
_OPENING = re.compile(rb'\{[ \t\r\n]*"[^"\\]{0,100}"')

_BRACKETS_AS_BRACES = bytes.maketrans(b"[]", b"{}")
_NEITHER_BRACKET_NOR_QUOTE = bytes(set(range(256)) - set(b'[]{}"'))


def fold_windows(
    unfolded: UnfoldedBytes,
    tally: Tally,
    limits: ParserLimits,
    progress: Callable[[int], None],
) -> bool:
    """Fold records into the tally for as long as they are plain; `unfolded` stands after the array's ``[``.

    Returns whether the file is folded to its end. If not, `unfolded` stands after the last record folded.
    """
    windows = _Windows(tally, limits)
    opening = b""
    while True:
        unfolded.fill(limits.window_bytes)
        start = _next_record(unfolded)
        if start is None:
            return _is_closed(unfolded)
        if not opening:
            match = _OPENING.match(unfolded.pending, start)
            opening = match[0] if match else b""
        cut = windows.fold_one(unfolded.pending, start, opening)
        if cut is None:
            return False
        unfolded.drop(cut)
        unfolded.inside = True
        progress(tally.trips)


def _next_record(unfolded: UnfoldedBytes) -> int | None:
    """Return where the next record begins among the pending bytes, after exactly one comma unless it is the first."""
    pending = unfolded.pending
    start = _after_white_space(pending, 0)
    if unfolded.inside:
        if not pending.startswith(b",", start):
            return None
        start = _after_white_space(pending, start + 1)
    return start if pending.startswith(b"{", start) else None


def _is_closed(unfolded: UnfoldedBytes) -> bool:
    pending = unfolded.pending
    close = _after_white_space(pending, 0)
    if not (unfolded.ended and pending.startswith(b"]", close)):
        return False
    return _after_white_space(pending, close + 1) == len(pending)


def _after_white_space(pending: bytearray, start: int) -> int:
    match = _WHITE_SPACE.match(pending, start)
    assert match is not None
    return match.end()


class _Windows:
    """Decodes and adds up one window after the other."""

    def __init__(self, tally: Tally, limits: ParserLimits) -> None:
        self._tally = tally
        self._limits = limits
        self._plain = msgspec.json.Decoder(list[PlainTrip])
        self._dated = msgspec.json.Decoder(list[DatedTrip])
        self._written = msgspec.json.Decoder(list[Trip])
        self._rungs = [self._fold_plain, self._fold_dated, self._fold_written]

    def fold_one(self, pending: bytearray, start: int, opening: bytes) -> int | None:
        """Fold the records from `start` on; return where the next one's comma is looked for, or ``None`` to decline."""
        end = min(len(pending), start + self._limits.window_bytes)
        for cut in self._cuts(pending, start, end, opening):
            with memoryview(pending) as view:
                document = b"".join((b"[", view[start:cut], b"]"))
            try:
                self._fold(document)
            except (msgspec.ValidationError, InvalidTrip, UnicodeDecodeError, _NotForThisPath):
                return None
            except (msgspec.DecodeError, RecursionError):
                continue
            return cut
        return None

    def _cuts(self, pending: bytearray, start: int, end: int, opening: bytes) -> Iterator[int]:
        """Yield ends to try, each after a ``}``: before the last record that opens like the first, then from the last.

        In files with nested objects the last ``}`` is seldom a record's; the first guess finds the one that is.
        """
        last_opening = pending.rfind(opening, start + 1, end) if opening else -1
        guess = pending.rfind(b"}", start, last_opening) + 1 if last_opening > 0 else 0
        if guess:
            yield guess
        cut = end
        for _ in range(self._limits.retreats + 1):
            brace = pending.rfind(b"}", start, cut)
            if brace < 0:
                return
            cut = brace
            yield brace + 1

    def _fold(self, document: bytes) -> None:
        """Add up an array of whole records, on the highest rung that takes it."""
        while len(self._rungs) > 1:
            try:
                self._rungs[0](document)
            except msgspec.ValidationError:
                del self._rungs[0]
            else:
                return
        self._rungs[0](document)

    def _fold_plain(self, document: bytes) -> None:
        self._add_dated(document, self._plain.decode(document))

    def _fold_dated(self, document: bytes) -> None:
        trips = self._dated.decode(document)
        self._check_skipped(document, len(trips))
        self._add_dated(document, trips)

    def _fold_written(self, document: bytes) -> None:
        trips = self._written.decode(document)
        self._check_skipped(document, len(trips))
        self._tally.add_all(trips)

    def _add_dated(self, document: bytes, trips: Sequence[DatedTrip]) -> None:
        escapes = b"\\" in document
        cut_short = escapes and b"\\u0000" in document
        if cut_short or not self._tally.add_all_dated(trips, rounded=escapes or b"." in document):
            self._fold_written(document)

    def _check_skipped(self, document: bytes, records: int) -> None:
        """Raise `_NotForThisPath` if a field that the decoder skipped may be one that the reference path refuses."""
        if not document.isascii():
            document.decode()
        # Deeper than the array and its records is only what has brackets beyond theirs.
        more_brackets = document.count(b"{") - records
        if document.find(b"[", 1) > 0:
            more_brackets += document.count(b"[") - 1
        if more_brackets > self._limits.depth - 2 and _is_deeper(document, self._limits.depth):
            raise _NotForThisPath
        if may_have_long_number(document):
            raise _NotForThisPath


class _NotForThisPath(Exception):
    """A window holds what the decoder accepts and the reference path may not."""


def _is_deeper(document: bytes, depth: int) -> bool:
    """Tell whether the brackets of a JSON document, those outside of strings, are nested deeper than `depth`.

    Two quotes side by side go without changing on which side of a string any bracket is, and mostly no other
    quotes are left once all else has gone. Then each round takes off the innermost brackets.
    """
    if b"\\" in document:
        document = document.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = document.translate(_BRACKETS_AS_BRACES, _NEITHER_BRACKET_NOR_QUOTE).replace(b'""', b"")
    braces = b"".join(marks.split(b'"')[::2])
    for _ in range(depth):
        if not braces:
            return False
        braces = braces.replace(b"{}", b"")
    return bool(braces)
