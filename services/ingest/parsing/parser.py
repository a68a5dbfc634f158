"""Folds one trip file, as it streams by, into what its city-day contributes.

`total_trip_file` is synchronous and touches nothing but the `read` it is given, so it runs in a worker thread and
in a test alike. The fast path folds what it can; what it declines, the reference path folds, and it alone finds fault.
So there is one verdict on any file, however the bytes were cut on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from services.ingest.parsing.bad_records import BadRecords
from services.ingest.parsing.batch_path import SMALLEST_WINDOW_BYTES, BatchPath
from services.ingest.parsing.container import make_container
from services.ingest.parsing.json_events import any_exponent
from services.ingest.parsing.record_reader import ArrayRecords, LineRecords
from services.ingest.parsing.strict_path import StrictPath
from services.ingest.parsing.totals import TripTotals
from services.ingest.parsing.trip_file import (
    BadRecord,
    FileFault,
    InvalidTripFile,
    ParserLimits,
    TooManyBadRecords,
    UnparsedBytes,
)
from shared.domain.contribution import Contribution
from shared.domain.file_rules import FileRules

__all__ = [
    "DEFAULT_LIMITS",
    "DEFAULT_RULES",
    "BadRecord",
    "FileRules",
    "FileTotals",
    "InvalidTripFile",
    "ParserLimits",
    "TooManyBadRecords",
    "total_trip_file",
]

DEFAULT_LIMITS: Final = ParserLimits()
DEFAULT_RULES: Final = FileRules()


class FileTotals(msgspec.Struct, frozen=True, kw_only=True):
    """What a valid file adds up to.

    `records` are all it has, of which `bad_records` are left out of the sums and the first of those are `reported`.
    `trips_on_other_dates` are among the sums. The reference path read `strict_path_records` of the records.
    """

    contribution: Contribution
    trips_on_other_dates: int
    records: int
    bad_records: int = 0
    reported: tuple[BadRecord, ...] = ()
    strict_path_records: int = 0


def total_trip_file(
    read: Callable[[], bytes],
    *,
    date: str,
    rules: FileRules = DEFAULT_RULES,
    limits: ParserLimits = DEFAULT_LIMITS,
    progress: Callable[[int], None] | None = None,
    force_strict: bool = False,
) -> FileTotals:
    """Fold the file of one city on one date (``YYYY-MM-DD``).

    `read` returns the next bytes, as many as it likes, and ``b""`` at the end; it may block, and what it raises is
    passed on. A valid file is read to its end. `progress` is told the number of trips folded so far, now and then. With
    `force_strict` the fast path is left out: slower, and the same answer. Records that break a rule are left out,
    counted and reported, as far as the `rules` allow.

    Raises `InvalidTripFile` for a file that is not read to its end, `TooManyBadRecords` for one that is and has more
    of them than it may, and nothing else for any bytes.
    """
    totals = TripTotals(date, other_dates_are_bad=rules.other_dates_are_bad)
    bad = BadRecords()
    unparsed = UnparsedBytes(read)
    report = progress or (lambda _trips: None)
    reader = (LineRecords if rules.form.is_lines else ArrayRecords)(unparsed, limits)
    reference = StrictPath(unparsed, reader, totals, bad, report)
    fast = None if force_strict else BatchPath(unparsed, rules.form, totals, limits, report)
    container = make_container(unparsed, rules.form, limits)
    with any_exponent():
        try:
            container.enter()
            _total_records(fast, reference, limits)
            container.leave()
        except FileFault as fault:
            raise InvalidTripFile(
                fault.reason, byte_offset=unparsed.offset, bad_records=bad.count, reported=bad.reported
            ) from fault
    records = totals.trips + bad.count
    if bad.count and not rules.bad_records_max.allows(bad.count, records=records):
        raise TooManyBadRecords(bad.count, bad.reported, records=records)
    return FileTotals(
        contribution=totals.contribution,
        trips_on_other_dates=totals.trips_on_other_dates,
        records=records,
        bad_records=bad.count,
        reported=bad.reported,
        strict_path_records=reference.records,
    )


def _total_records(fast: BatchPath | None, reference: StrictPath, limits: ParserLimits) -> None:
    """Fold all records. The longer the fast path takes none, the rarer it is asked."""
    if fast is None:
        reference.total(None)
        return
    stretch_bytes = SMALLEST_WINDOW_BYTES
    more = True
    while more:
        if fast.total():
            stretch_bytes = SMALLEST_WINDOW_BYTES
        more = reference.total(stretch_bytes)
        stretch_bytes = min(2 * stretch_bytes, limits.window_bytes)
