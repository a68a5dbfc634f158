"""The batch path: decodes whole windows of records with one typed decoder.

A window is a part of the file that ends after a ``}``, or at the end of a line. In square brackets it is a JSON
document, which is decoded as an array of trips. A JSON decoder reads from left to right. If it succeeds, the window
holds only whole records, whatever its end was. If it fails, the end was inside a string or a nested object, and the
path tries an earlier ``}``.

This path never rejects a record. It declines a window that it cannot read, or that it might read differently than the
strict path. It then leaves the bytes to the strict path. So it may accept only windows that the strict path accepts
with the same totals. Its decoders are not strict enough in three places:

- they skip unknown fields without a check of their UTF-8, their depth or the length of their numbers;
- they read departure times in the way that `DatedTrip` describes;
- they accept a record that spans several lines.

There are three decoders. `PlainTrip` is the fastest and forbids other fields. `DatedTrip` skips other fields. `Trip`
leaves the departure time to the rules. A window that a decoder rejects goes to the next decoder, which then stays in
use for some windows before the path tries the fastest again. If all decoders reject a window, the path tries a smaller
one, so that one record makes it decline little of the file. After each success the window doubles.
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
WINDOWS_PER_LOWER_LEVEL: Final = 16

_OPENING = re.compile(rb'\{[ \t\r\n]*"[^"\\]{0,100}"')
_AROUND_LINE_BREAK = re.compile(rb"[ \t\r]*\n[ \t\r\n]*")
_BRACKETS_AS_BRACES = bytes.maketrans(b"[]", b"{}")
_NEITHER_BRACKET_NOR_QUOTE = bytes(set(range(256)) - set(b'[]{}"'))

_Trip = TypeVar("_Trip", PlainTrip, DatedTrip, Trip)


class BatchPath:
    """Totals records until it has to decline one. `unparsed` starts where the next record is expected."""

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
        self._form: _FileForm = _LineForm() if form.is_lines else _ArrayForm(limits.retreats)
        self._decoders = _Decoders(self._form, totals, limits)
        self._smallest_bytes = min(SMALLEST_WINDOW_BYTES, limits.window_bytes)
        self._window_bytes = limits.window_bytes

    def total(self) -> bool:
        """Total windows until the smallest is declined. Return whether any window was totalled."""
        any_totalled = False
        while True:
            self._unparsed.fill(self._limits.window_bytes)
            start = self._form.next_record(self._unparsed)
            if start is None:
                return any_totalled
            if self._total_window(start):
                any_totalled = True
                self._window_bytes = min(2 * self._window_bytes, self._limits.window_bytes)
            elif self._window_bytes > self._smallest_bytes:
                self._window_bytes = max(self._window_bytes // SHRINK_FACTOR, self._smallest_bytes)
            else:
                return any_totalled

    def _total_window(self, start: int) -> bool:
        pending = self._unparsed.pending
        end = min(len(pending), start + self._window_bytes)
        for cut in self._form.cuts(self._unparsed, start, end):
            with memoryview(pending) as view:
                window = b"".join((b"[", view[start:cut], b"]"))
            try:
                self._decoders.total(window)
            except (msgspec.ValidationError, InvalidTrip, UnicodeDecodeError, _Declined):
                return False
            except (msgspec.DecodeError, RecursionError):
                continue
            self._unparsed.drop(cut)
            self._unparsed.inside = True
            self._progress(self._totals.trips)
            return True
        return False


class _FileForm(Protocol):
    """Cuts one form of file into windows, and makes the decoders of a window."""

    def next_record(self, unparsed: UnparsedBytes) -> int | None:
        """Return the start of the next record in the pending bytes, or None if it is not an object."""

    def cuts(self, unparsed: UnparsedBytes, start: int, end: int) -> Iterator[int]:
        """Yield possible ends of a window, the best first."""

    def decoder(self, kind: type[_Trip]) -> Callable[[bytes], list[_Trip]]:
        """Return a decoder of a window in brackets. It raises the errors of `msgspec`, or `_Declined`."""


class _ArrayForm:
    """Records separated by commas."""

    def __init__(self, retreats: int) -> None:
        self._retreats = retreats
        self._opening = b""

    def next_record(self, unparsed: UnparsedBytes) -> int | None:
        """Return the start of the next record, after exactly one comma unless it is the first."""
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
        """Yield ends after a ``}``: first before the last record that opens like the first one, then from the end.

        In a file with nested objects the last ``}`` seldom ends a record, but the first guess does.
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


class _LineForm:
    """One record per line."""

    def next_record(self, unparsed: UnparsedBytes) -> int | None:
        """Return the start of the next record, after a line break unless it is the first."""
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
        """Return a decoder of lines that declines a record on two lines, and two records on one line."""
        decode_lines = msgspec.json.Decoder(kind).decode_lines

        def decode(window: bytes) -> list[_Trip]:
            lines = memoryview(window)[1:-1]
            trips = decode_lines(lines)
            if not _has_one_record_per_line(window, len(trips)):
                lines_alone = _AROUND_LINE_BREAK.sub(b"\n", window[1:-1]).strip()
                if not _has_one_record_per_line(lines_alone, len(trips)):
                    raise _Declined
            return trips

        return decode


def _has_one_record_per_line(lines: bytes, records: int) -> bool:
    """Tell whether JSON objects are separated by single line breaks and contain no line break.

    Only two values of the top level can be separated by a line break alone.
    """
    if lines.count(b"\n") != records - 1:
        return False
    separators = lines.count(b"}\n{")
    return separators == records - 1 or separators + lines.count(b"}\r\n{") == records - 1


def _after_white_space(pending: bytearray, start: int) -> int:
    match = WHITE_SPACE.match(pending, start)
    assert match is not None
    return match.end()


class _Decoders:
    """The decoders of windows, from the fastest to the most general, and the one in use."""

    def __init__(self, form: _FileForm, totals: TripTotals, limits: ParserLimits) -> None:
        self._totals = totals
        self._depth_max = limits.depth
        self._plain = form.decoder(PlainTrip)
        self._dated = form.decoder(DatedTrip)
        self._written = form.decoder(Trip)
        self._levels = (self._total_plain, self._total_dated, self._total_written)
        self._level = 0
        self._windows_here = 0

    def total(self, window: bytes) -> None:
        """Total a window with the first decoder, from the one in use, that accepts it. Raises the last one's error."""
        for level in range(self._level, len(self._levels)):
            try:
                self._levels[level](window)
            except msgspec.ValidationError:
                if level == len(self._levels) - 1:
                    raise
            else:
                self._remember_level(level)
                return

    def _remember_level(self, level: int) -> None:
        self._windows_here = self._windows_here + 1 if level == self._level else 0
        self._level = level if self._windows_here < WINDOWS_PER_LOWER_LEVEL else 0

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
        """Add trips with the decoder's departure times. If it may have misread one, decode the window again."""
        escapes = b"\\" in window
        cut_short = escapes and b"\\u0000" in window
        # The decoder may have rounded the last moment of the previous date up to midnight.
        rounded = escapes or b"." in window
        if cut_short or (rounded and any(trip.departure_time.time() == time.min for trip in trips)):
            self._total_written(window)
        else:
            self._totals.add_all(trips, on_other_dates=self._totals.count_dated_on_other_dates(trips))

    def _check_skipped(self, window: bytes, records: int) -> None:
        """Raise `_Declined` if the strict path might refuse a field that the decoder skipped."""
        if not window.isascii():
            window.decode()
        # Only brackets beyond those of the array and its records can nest deeper.
        more_brackets = window.count(b"{") - records
        if window.find(b"[", 1) > 0:
            more_brackets += window.count(b"[") - 1
        if more_brackets > self._depth_max - 2 and _is_deeper(window, self._depth_max):
            raise _Declined
        if may_have_long_number(window):
            raise _Declined


class _Declined(Exception):
    """The decoder accepts the window, but the strict path might not."""


def _is_deeper(window: bytes, depth: int) -> bool:
    """Tell whether the brackets of a JSON document, outside of strings, are nested deeper than `depth`.

    First remove everything but brackets and quotes. Then remove pairs of adjacent quotes, which does not change which
    brackets are inside strings, and usually leaves no quotes. Each round then removes the innermost brackets.
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
