"""The fast path: whole windows of records through one typed decoder.

A window is a stretch of the file that ends in ``}``, or in a line. Between square brackets it is a document, decoded
as an array of trips; JSON is read from left to right, so if that succeeds the window is a run of whole records,
wherever its end came from. If it does not, the end was inside a string or a nested object, and an earlier ``}`` is
tried.

This path never judges. Whatever it cannot read, or would read otherwise than the reference path, it declines:
it leaves the bytes unparsed, and the reference path goes on from there. It may therefore only accept what the
reference path accepts too, with the same sums, and these are the places where its decoder is not enough:

- it skips the fields it does not know, without looking at their UTF-8, their depth or the length of their numbers;
- what it does to a departure time, `DatedTrip` says;
- a record may go on over several lines for it.

Three decoders stand on a ladder: `PlainTrip` is the quickest and forbids other fields, `DatedTrip` skips them, and
`Trip` leaves the departure time to the rules. A file steps down when it brings a window that only a lower rung takes,
and now and then tries the top again. A window that no rung takes is made smaller, so that little of the file is
declined for one record; each that is folded is followed by one of twice the size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import time
from typing import Final, Protocol, TypeVar

import msgspec

from services.ingest.parsing.totals import TripTotals
from services.ingest.parsing.trip_file import WHITE_SPACE, ParserLimits, UnparsedBytes, may_have_long_number
from services.ingest.parsing.trips import DatedTrip, InvalidTrip, PlainTrip, Trip
from shared.domain.file_rules import RecordsForm

SMALLEST_WINDOW_BYTES: Final = 2048
SHRINK_FACTOR: Final = 8
WINDOWS_ON_LOWER_RUNG: Final = 16

_OPENING = re.compile(rb'\{[ \t\r\n]*"[^"\\]{0,100}"')
_AROUND_LINE_BREAK = re.compile(rb"[ \t\r]*\n[ \t\r\n]*")
_BRACKETS_AS_BRACES = bytes.maketrans(b"[]", b"{}")
_NEITHER_BRACKET_NOR_QUOTE = bytes(set(range(256)) - set(b'[]{}"'))

_Trip = TypeVar("_Trip", PlainTrip, DatedTrip, Trip)


class BatchPath:
    """Folds records into the tally for as long as they are plain; `unparsed` stands where a record is awaited."""

    def __init__(
        self,
        unparsed: UnparsedBytes,
        form: RecordsForm,
        totals: TripTotals,
        limits: ParserLimits,
        progress: Callable[[int], None],
    ) -> None:
        self._unparsed = unparsed
        self._limits = limits
        self._progress = progress
        self._totals = totals
        self._shape: _Shape = _LineShape() if form.is_lines else _ArrayShape(limits.retreats)
        self._ladder = _Ladder(self._shape, totals, limits)
        self._smallest_bytes = min(SMALLEST_WINDOW_BYTES, limits.window_bytes)
        self._window_bytes = limits.window_bytes

    def total(self) -> bool:
        """Fold windows until the smallest is declined; return whether there was one before."""
        folded = False
        while True:
            self._unparsed.fill(self._limits.window_bytes)
            start = self._shape.next_record(self._unparsed)
            if start is None:
                return folded
            if self._total_window(start):
                folded = True
                self._window_bytes = min(2 * self._window_bytes, self._limits.window_bytes)
            elif self._window_bytes > self._smallest_bytes:
                self._window_bytes = max(self._window_bytes // SHRINK_FACTOR, self._smallest_bytes)
            else:
                return folded

    def _total_window(self, start: int) -> bool:
        pending = self._unparsed.pending
        end = min(len(pending), start + self._window_bytes)
        for cut in self._shape.cuts(self._unparsed, start, end):
            with memoryview(pending) as view:
                window = b"".join((b"[", view[start:cut], b"]"))
            try:
                self._ladder.total(window)
            except (msgspec.ValidationError, InvalidTrip, UnicodeDecodeError, _NotForThisPath):
                return False
            except (msgspec.DecodeError, RecursionError):
                continue
            self._unparsed.drop(cut)
            self._unparsed.inside = True
            self._progress(self._totals.trips)
            return True
        return False


class _Shape(Protocol):
    """How one form of file is cut into windows, and how a window is decoded."""

    def next_record(self, unparsed: UnparsedBytes) -> int | None:
        """Return where the next record begins among the pending bytes, if it is an object."""

    def cuts(self, unparsed: UnparsedBytes, start: int, end: int) -> Iterator[int]:
        """Yield ends of a window to try, the best first."""

    def decoder(self, kind: type[_Trip]) -> Callable[[bytes], list[_Trip]]:
        """Return what decodes the records of a window, between brackets; it raises as `msgspec` does, or declines."""


class _ArrayShape:
    """Records separated by commas."""

    def __init__(self, retreats: int) -> None:
        self._retreats = retreats
        self._opening = b""

    def next_record(self, unparsed: UnparsedBytes) -> int | None:
        """Return where the next record begins, after exactly one comma unless it is the first."""
        pending = unparsed.pending
        start = _after_white_space(pending, 0)
        if unparsed.inside:
            if not pending.startswith(b",", start):
                return None
            start = _after_white_space(pending, start + 1)
        if not pending.startswith(b"{", start):
            return None
        if not self._opening and (match := _OPENING.match(pending, start)):
            self._opening = match[0]
        return start

    def cuts(self, unparsed: UnparsedBytes, start: int, end: int) -> Iterator[int]:
        """Yield ends after a ``}``: before the last record that opens like the first, then from the last.

        In files with nested objects the last ``}`` is seldom a record's; the first guess finds the one that is.
        """
        pending = unparsed.pending
        last_opening = pending.rfind(self._opening, start + 1, end) if self._opening else -1
        guess = pending.rfind(b"}", start, last_opening) + 1 if last_opening > 0 else 0
        if guess:
            yield guess
        cut = end
        for _ in range(self._retreats + 1):
            brace = pending.rfind(b"}", start, cut)
            if brace < 0:
                return
            cut = brace
            yield brace + 1

    def decoder(self, kind: type[_Trip]) -> Callable[[bytes], list[_Trip]]:
        """Return the decoder of an array."""
        return msgspec.json.Decoder(list[kind]).decode  # type: ignore[valid-type] # a list of what the variable holds


class _LineShape:
    """Records each in a line of its own."""

    def next_record(self, unparsed: UnparsedBytes) -> int | None:
        """Return where the next record begins, after a line break unless it is the first."""
        pending = unparsed.pending
        start = _after_white_space(pending, 0)
        if unparsed.inside and pending.find(b"\n", 0, start) < 0:
            return None
        return start if pending.startswith(b"{", start) else None

    def cuts(self, unparsed: UnparsedBytes, start: int, end: int) -> Iterator[int]:
        """Yield the end of the last whole line."""
        if end == len(unparsed.pending) and unparsed.ended:
            yield end
            return
        line_break = unparsed.pending.rfind(b"\n", start, end)
        if line_break > 0:
            yield line_break

    def decoder(self, kind: type[_Trip]) -> Callable[[bytes], list[_Trip]]:
        """Return a decoder of lines that declines if a record goes on over two, or a line holds two."""
        decode_lines = msgspec.json.Decoder(kind).decode_lines

        def decode(window: bytes) -> list[_Trip]:
            lines = memoryview(window)[1:-1]
            trips = decode_lines(lines)
            if not _is_one_a_line(window, len(trips)):
                lines_alone = _AROUND_LINE_BREAK.sub(b"\n", window[1:-1]).strip()
                if not _is_one_a_line(lines_alone, len(trips)):
                    raise _NotForThisPath
            return trips

        return decode


def _is_one_a_line(lines: bytes, records: int) -> bool:
    """Tell whether JSON objects are separated by single line breaks, and have none inside.

    Nothing else than two values of the top level can have no more between them than a line break.
    """
    if lines.count(b"\n") != records - 1:
        return False
    separators = lines.count(b"}\n{")
    return separators == records - 1 or separators + lines.count(b"}\r\n{") == records - 1


def _after_white_space(pending: bytearray, start: int) -> int:
    match = WHITE_SPACE.match(pending, start)
    assert match is not None
    return match.end()


class _Ladder:
    """The decoders of windows, from the quickest to the most patient, and the one that the file is at."""

    def __init__(self, shape: _Shape, totals: TripTotals, limits: ParserLimits) -> None:
        self._totals = totals
        self._depth_max = limits.depth
        self._plain = shape.decoder(PlainTrip)
        self._dated = shape.decoder(DatedTrip)
        self._written = shape.decoder(Trip)
        self._rungs = (self._total_plain, self._total_dated, self._total_written)
        self._rung = 0
        self._windows_here = 0

    def total(self, window: bytes) -> None:
        """Add up the records of a window, on the first rung from here that takes it, or raise why the last does not."""
        for rung in range(self._rung, len(self._rungs)):
            try:
                self._rungs[rung](window)
            except msgspec.ValidationError:
                if rung == len(self._rungs) - 1:
                    raise
            else:
                self._stay_for_a_while(rung)
                return

    def _stay_for_a_while(self, rung: int) -> None:
        self._windows_here = self._windows_here + 1 if rung == self._rung else 0
        self._rung = rung if self._windows_here < WINDOWS_ON_LOWER_RUNG else 0

    def _total_plain(self, window: bytes) -> None:
        self._add_dated(window, self._plain(window))

    def _total_dated(self, window: bytes) -> None:
        trips = self._dated(window)
        self._check_skipped(window, len(trips))
        self._add_dated(window, trips)

    def _total_written(self, window: bytes) -> None:
        trips = self._written(window)
        self._check_skipped(window, len(trips))
        self._totals.add_all(trips, on_other_dates=self._totals.count_on_other_dates(trips))

    def _add_dated(self, window: bytes, trips: Sequence[DatedTrip]) -> None:
        """Add trips whose departures are as the decoder read them; if it may have misread one, decode them again."""
        escapes = b"\\" in window
        cut_short = escapes and b"\\u0000" in window
        # What was rounded to midnight may have been written as the last moment of the date before.
        rounded = escapes or b"." in window
        if cut_short or (rounded and any(trip.departure_time.time() == time.min for trip in trips)):
            self._total_written(window)
        else:
            self._totals.add_all(trips, on_other_dates=self._totals.count_dated_on_other_dates(trips))

    def _check_skipped(self, window: bytes, records: int) -> None:
        """Raise `_NotForThisPath` if a field that the decoder skipped may be one that the reference path refuses."""
        if not window.isascii():
            window.decode()
        # Deeper than the array and its records is only what has brackets beyond theirs.
        more_brackets = window.count(b"{") - records
        if window.find(b"[", 1) > 0:
            more_brackets += window.count(b"[") - 1
        if more_brackets > self._depth_max - 2 and _is_deeper(window, self._depth_max):
            raise _NotForThisPath
        if may_have_long_number(window):
            raise _NotForThisPath


class _NotForThisPath(Exception):
    """A window holds what the decoder accepts and the reference path may not."""


def _is_deeper(window: bytes, depth: int) -> bool:
    """Tell whether the brackets of a JSON document, those outside of strings, are nested deeper than `depth`.

    Two quotes side by side go without changing on which side of a string any bracket is, and mostly no other
    quotes are left once all else has gone. Then each round takes off the innermost brackets.
    """
    if b"\\" in window:
        window = window.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = window.translate(_BRACKETS_AS_BRACES, _NEITHER_BRACKET_NOR_QUOTE).replace(b'""', b"")
    braces = b"".join(marks.split(b'"')[::2])
    for _ in range(depth):
        if not braces:
            return False
        braces = braces.replace(b"{}", b"")
    return bool(braces)
