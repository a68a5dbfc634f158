"""Folds one trip file, as it streams by, into what its city-day contributes.

`fold_trip_file` is synchronous and touches nothing but the `read` it is given, so it runs in a worker thread and
in a test alike. The fast path folds what it can; from the first byte it declines, the reference path goes on,
and it alone finds fault. So there is one verdict on any file, however the bytes were cut on their way.

A file is one JSON array of trips. Other forms (records under a path of an object, one record a line) belong into
`_enter_records`, which brings the bytes to where the first record is awaited.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec

from services.ingest.bad_records import BadRecords
from services.ingest.fast_path import fold_windows
from services.ingest.reference_path import fold_events
from services.ingest.tally import Tally
from services.ingest.trip_file import (
    BadRecord,
    InvalidTripFile,
    ParserLimits,
    TooManyBadRecords,
    UnfoldedBytes,
    shortened,
)
from shared.contribution import Contribution
from shared.file_rules import FileRules

__all__ = [
    "DEFAULT_LIMITS",
    "DEFAULT_RULES",
    "BadRecord",
    "FileRules",
    "FoldedFile",
    "InvalidTripFile",
    "ParserLimits",
    "TooManyBadRecords",
    "fold_trip_file",
]

DEFAULT_LIMITS: Final = ParserLimits()
DEFAULT_RULES: Final = FileRules()

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class FoldedFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a valid file adds up to.

    `records` are all it has, of which `bad_records` are left out of the sums and the first of those are `reported`.
    `trips_on_other_dates` are among the sums. `path` is the one that read the end of the file.
    """

    contribution: Contribution
    trips_on_other_dates: int
    path: Literal["fast", "reference"]
    records: int = 0
    bad_records: int = 0
    reported: tuple[BadRecord, ...] = ()


def fold_trip_file(
    read: Callable[[], bytes],
    *,
    date: str,
    rules: FileRules = DEFAULT_RULES,
    limits: ParserLimits = DEFAULT_LIMITS,
    progress: Callable[[int], None] | None = None,
    force_reference: bool = False,
) -> FoldedFile:
    """Fold the file of one city on one date (``YYYY-MM-DD``).

    `read` returns the next bytes, as many as it likes, and ``b""`` at the end; it may block, and what it raises is
    passed on. A valid file is read to its end. `progress` is told the number of trips folded so far, now and then. With
    `force_reference` the fast path is left out: slower, and the same answer.

    Records that break a rule are left out, counted and reported, as far as the `rules` allow.

    Raises `InvalidTripFile` for a file that is not read to its end, `TooManyBadRecords` for one that is and has more
    of them than it may, and nothing else for any bytes.
    """
    tally = Tally(date, other_dates_are_bad=rules.other_dates_are_bad)
    bad = BadRecords()
    unfolded = UnfoldedBytes(read)
    report = progress or (lambda _trips: None)
    _enter_records(unfolded)
    path: Literal["fast", "reference"] = "fast"
    if force_reference or not fold_windows(unfolded, tally, limits, report):
        path = "reference"
        fold_events(unfolded, tally, limits, report, bad)
    records = tally.trips + bad.count
    if bad.count and not rules.bad_records_max.allows(bad.count, records=records):
        raise TooManyBadRecords(bad.count, bad.reported, records=records)
    return FoldedFile(
        contribution=tally.contribution,
        trips_on_other_dates=tally.trips_on_other_dates,
        path=path,
        records=records,
        bad_records=bad.count,
        reported=bad.reported,
    )


def _enter_records(unfolded: UnfoldedBytes) -> None:
    """Go past a byte order mark, white space and the bracket that opens the array of trips."""
    unfolded.fill(len(_BYTE_ORDER_MARK))
    if unfolded.pending.startswith(_BYTE_ORDER_MARK):
        unfolded.drop(len(_BYTE_ORDER_MARK))
    while not (text := unfolded.pending.lstrip(b" \t\r\n")):
        if unfolded.ended:
            raise InvalidTripFile("empty document", byte_offset=unfolded.offset)
        unfolded.drop(len(unfolded.pending))
        unfolded.fill(1)
    unfolded.drop(len(unfolded.pending) - len(text))
    first = bytes(unfolded.pending[:1])
    if first == b"{":
        raise InvalidTripFile("expected an array of trips, got an object", byte_offset=unfolded.offset)
    if first != b"[":
        raise InvalidTripFile("expected an array of trips", byte_offset=unfolded.offset, value=shortened(first))
    unfolded.drop(1)
