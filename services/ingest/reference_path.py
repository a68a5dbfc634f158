"""The reference path: any file, event by event, and every verdict.

The parser is ijson on yajl, taken as a stream of events. Around it stand the bounds it does not have itself (how
deep, how long a record, how long a number) and the checks it leaves out: yajl accepts an unfinished token after
the end of the document, and vertical tabs and form feeds for white space. Long integers must not reach it: when
Python refuses to convert one, ijson goes on with an event that holds no object.

One thing is left as yajl has it, in text that no sum is made of: the escape of a high surrogate without its low half
is read as ``?``, the escape of a low one alone is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from decimal import InvalidOperation, localcontext
from typing import Any, Final

import ijson

from services.ingest.bad_records import BadRecords
from services.ingest.record_locator import RecordLocator
from services.ingest.tally import Tally
from services.ingest.trip_file import (
    NUMBER_MAX_DIGITS,
    InvalidTripFile,
    ParserLimits,
    UnfoldedBytes,
    may_have_long_number,
    shortened,
)
from services.ingest.trips import FIELD_NAMES, InvalidTrip, parse_trip

_YAJL = ijson.get_backend("yajl2_c")

_SCALARS: Final = frozenset({"string", "number", "boolean", "null"})
_SOMETHING_FOLLOWS: Final = "something follows the array of trips"
_OPENERS: Final = frozenset({"start_map", "start_array"})
_FALSE_WHITE_SPACE = re.compile(rb"[\v\f]")
_DIGITS = re.compile(rb"[0-9]+")


def fold_events(
    unfolded: UnfoldedBytes,
    tally: Tally,
    limits: ParserLimits,
    progress: Callable[[int], None],
    bad: BadRecords,
) -> None:
    """Fold all records that `unfolded` still has, to the end of the file; it stands inside the array's ``[``.

    Raises `InvalidTripFile` for what ends a file, and what reading raises.
    """

    def add_bad(fault: InvalidTrip) -> None:
        bad.add(fault, record_number=records.number_of(records.folded), find_offset=feed.fault_offset)

    records = _Records(tally, limits, add_bad)
    feed = _Feed(unfolded, limits, records, lambda: progress(tally.trips))
    events = _YAJL.basic_parse(feed, buf_size=limits.piece_bytes, use_float=False)
    with localcontext() as context:
        # A number in an ignored field may have an exponent beyond any Decimal: it is JSON, so it is ignored too.
        context.traps[InvalidOperation] = False
        try:
            records.fold(iter(events), skip_first=unfolded.inside)
        except InvalidTrip as error:
            fault = error
            cause: Exception = error
        except (ijson.JSONError, UnicodeDecodeError) as error:
            if error is feed.read_error:
                raise
            fault = InvalidTrip(_syntax_reason(error))
            cause = error
        else:
            return
    raise InvalidTripFile(
        fault.reason,
        byte_offset=feed.fault_offset(),
        record_number=None if records.ended else records.number_of(records.folded),
        field=fault.field,
        value=None if fault.value is None else shortened(fault.value),
        bad_records=bad.count,
        reported=bad.reported,
    ) from cause


def _syntax_reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"a string is not Unicode: {error.reason}"
    text = error.args[0] if error.args else ""
    line = (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).partition("\n")[0]
    if "premature EOF" in line:
        return "the file ends inside its array of trips"
    if "trailing garbage" in line:
        return _SOMETHING_FOLLOWS
    return f"not JSON: {line}"


class _Records:
    """Builds one record at a time from events and adds it up; of nested values it keeps no more than their depth."""

    def __init__(self, tally: Tally, limits: ParserLimits, add_bad: Callable[[InvalidTrip], None]) -> None:
        self._tally = tally
        self._add_bad = add_bad
        self._depth_max = limits.depth
        self._trips_before = tally.trips
        self._record: dict[str, Any] | None = None
        self._nested = 0
        self.folded = 0
        self.ended = False

    @property
    def between(self) -> bool:
        """Whether no record is open."""
        return self._record is None

    def number_of(self, record: int) -> int:
        """Return a record's number in the file, from 1, by its place among those folded here, from 0."""
        return self._trips_before + record + 1

    def fold(self, events: Iterator[tuple[str, Any]], *, skip_first: bool) -> None:
        """Fold the records of the array that the events describe; `skip_first` passes over its first value."""
        for _ in range(1 + skip_first):
            next(events)
        record: dict[str, Any] | None = None
        key = ""
        for event, value in events:
            if event == "map_key":
                key = value
            elif event in _SCALARS:
                if record is None:
                    raise InvalidTrip("expected an object for a trip", value=value)
                if key in FIELD_NAMES and not self._nested:
                    record[key] = value
            else:
                record = self._open(event, key) if event in _OPENERS else self._close()

    def _open(self, event: str, key: str) -> dict[str, Any]:
        """Begin a record, or a value nested in it; return the record."""
        if self._record is None:
            if event != "start_map":
                raise InvalidTrip("expected an object for a trip, got an array")
            self._record = {}
            return self._record
        self._nested += 1
        if 2 + self._nested > self._depth_max:
            raise InvalidTrip(f"values are nested deeper than {self._depth_max}")
        if self._nested == 1 and key in FIELD_NAMES:
            self._record[key] = {} if event == "start_map" else []
        return self._record

    def _close(self) -> dict[str, Any] | None:
        """End a nested value, the record or the array; return the record if it is still open."""
        if self._nested:
            self._nested -= 1
            return self._record
        if self._record is None:
            self.ended = True
            return None
        try:
            self._tally.add(parse_trip(self._record))
        except InvalidTrip as fault:
            self._add_bad(fault)
        self._record = None
        self.folded += 1
        return None


class _Feed:
    """The file that the parser reads from, piece by piece, each cut after a ``}`` if it has one.

    When the parser asks for the next piece, all events of the pieces before have been folded. So if a piece
    ended in ``}`` and a record ended in it, the two are the same, and where the next record begins is known. If
    records are too long for that, their places are followed by bracket and quote.
    """

    def __init__(
        self, unfolded: UnfoldedBytes, limits: ParserLimits, records: _Records, progress: Callable[[], None]
    ) -> None:
        self.read_error: Exception | None = None
        self._unfolded = unfolded
        self._limits = limits
        self._records = records
        self._progress = progress
        self._opened = False
        self._folded = 0
        self._piece = b""
        self._last_bytes = b""
        self._locator = RecordLocator(unfolded.offset, record=0)
        self._unscanned = bytearray()
        """What the parser has been given and the locator has not."""

    def read(self, size: int) -> bytes:
        """Return the next piece, of at most `size` bytes."""
        if size == 0:
            return b""
        if not self._opened:
            self._opened = True
            # After a record the parser has to be where a record is behind it, or `[{…},]` would pass for `[]`.
            return b"[null " if self._unfolded.inside else b"["
        self._settle()
        self._progress()
        self._piece = b"" if self._records.ended else self._next_piece(size)
        return self._piece

    def fault_offset(self) -> int:
        """Return where the record that is being read begins, or else what has been read ends."""
        self._scan_to(self._unfolded.offset)
        start = self._locator.start_of(self._records.folded)
        return (self._locator.array_end or self._unfolded.offset) if start is None else start

    def _next_piece(self, size: int) -> bytes:
        """Take what may go to the parser, up to the next byte that may not; raise `InvalidTrip` if that is the first.

        The parser begins an unfinished token anew with every piece, so a piece is as large as it may be.
        """
        self._fill(size)
        pending = self._unfolded.pending
        end = min(size, len(pending))
        piece = bytes(pending[: pending.rfind(b"}", 0, end) + 1 or end])
        self._unscanned += piece
        safe = self._before_long_number(_before_false_white_space(piece))
        del self._unscanned[len(self._unscanned) - len(piece) + len(safe) :]
        self._unfolded.drop(len(safe))
        self._last_bytes = (self._last_bytes + safe)[-NUMBER_MAX_DIGITS:]
        return safe

    def _fill(self, size: int) -> None:
        try:
            self._unfolded.fill(size)
        except Exception as error:
            self.read_error = error
            raise

    def _settle(self) -> None:
        """Draw the conclusions from all events of the last piece having been folded."""
        records = self._records
        if self._unfolded.offset - self._locator.began > self._limits.record_bytes:
            self._scan_to(self._unfolded.offset)
            self._refuse_long_record()
            self._locator.forget_before(records.folded)
        if records.ended:
            self._expect_nothing_more()
        elif records.between and records.folded > self._folded and self._piece.endswith(b"}"):
            self._locator = RecordLocator(self._unfolded.offset, record=records.folded)
            self._unscanned.clear()
        self._folded = records.folded

    def _expect_nothing_more(self) -> None:
        """Read to the end of the file: yajl would accept an unfinished token there, such as `"` or `tru`."""
        self._scan_to(self._unfolded.offset)
        while self._locator.array_end is not None and not self._locator.more_after_array:
            self._fill(1)
            pending = self._unfolded.pending
            if not pending:
                return
            self._locator.scan(bytes(pending))
            self._unfolded.drop(len(pending))
        raise InvalidTrip(_SOMETHING_FOLLOWS)

    def _refuse_long_record(self) -> None:
        longest = self._locator.longest
        if longest.size_bytes > self._limits.record_bytes:
            raise InvalidTripFile(
                f"a record is longer than {self._limits.record_bytes} bytes",
                byte_offset=longest.offset,
                record_number=self._records.number_of(longest.record),
            )

    def _before_long_number(self, piece: bytes) -> bytes:
        """Return the piece up to the first number that Python may refuse to convert."""
        data = self._last_bytes + piece
        if not may_have_long_number(data):
            return piece
        for digits in _DIGITS.finditer(data):
            if digits.end() - digits.start() > NUMBER_MAX_DIGITS:
                start = max(0, digits.start() - len(self._last_bytes))
                self._scan_to(self._unfolded.offset + start)
                if not self._locator.in_string:
                    if start == 0:
                        raise InvalidTrip(f"a number has more than {NUMBER_MAX_DIGITS} digits in a row")
                    return piece[:start]
        return piece

    def _scan_to(self, offset: int) -> None:
        size = offset - self._locator.offset
        self._locator.scan(bytes(self._unscanned[:size]))
        del self._unscanned[:size]


def _before_false_white_space(piece: bytes) -> bytes:
    """Return the piece up to a byte that yajl takes for white space; JSON has it nowhere."""
    match = _FALSE_WHITE_SPACE.search(piece)
    if match is None:
        return piece
    if match.start() == 0:
        raise InvalidTrip("not JSON: a vertical tab or form feed")
    return piece[: match.start()]
