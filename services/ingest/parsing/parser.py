"""Totals one trip file while it is streamed.

`total_trip_file` is synchronous and uses nothing but its `read` function, so it runs in a thread or in a test. The
batch path totals the records that it can, and the strict path totals the rest. Only the strict path rejects records, so
the result does not depend on how the bytes were cut into chunks.
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
from services.ingest.parsing.trips import rule_version
from shared.domain.contribution import FIGURE_MAX, Contribution, figure_beyond
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
    """The totals of a valid file.

    `records` counts all records. The totals leave out the `bad_records`, of which the first are `reported`. They
    include the `trips_on_other_dates`. The strict path read `strict_path_records` of the records. `rule_version` is
    that of the rules that were in force when the parsing began.
    """

    contribution: Contribution
    trips_on_other_dates: int
    records: int
    bad_records: int = 0
    reported: tuple[BadRecord, ...] = ()
    strict_path_records: int = 0
    rule_version: int = msgspec.field(default_factory=rule_version)


def total_trip_file(
    read: Callable[[], bytes],
    *,
    date: str,
    rules: FileRules = DEFAULT_RULES,
    limits: ParserLimits = DEFAULT_LIMITS,
    progress: Callable[[int], None] | None = None,
    force_strict: bool = False,
) -> FileTotals:
    """Total the file of one city on one date (``YYYY-MM-DD``).

    `read` returns the next bytes in chunks of any size, and ``b""`` at the end. It may block, and its errors are passed
    on. A valid file is read to its end. `progress` regularly receives the number of trips totalled so far.
    `force_strict` disables the batch path: that is slower and gives the same result. Records that break a rule are
    skipped, counted and reported, as far as the `rules` allow.

    Raises `InvalidTripFile` for a file that cannot be read to its end, and `TooManyBadRecords` for a file that has more
    bad records than the rules allow. It raises nothing else for any bytes.
    """
    totals = TripTotals(date, other_dates_are_bad=rules.other_dates_are_bad)
    bad = BadRecords()
    unparsed = UnparsedBytes(read)
    report = progress or (lambda _trips: None)
    reader = (LineRecords if rules.form.is_lines else ArrayRecords)(unparsed, limits)
    strict = StrictPath(unparsed, reader, totals, bad, report)
    batch = None if force_strict else BatchPath(unparsed, rules.form, totals, limits, report)
    container = make_container(unparsed, rules.form, limits)
    with any_exponent():
        try:
            container.enter()
            _total_records(batch, strict, limits)
            container.leave()
        except FileFault as fault:
            raise InvalidTripFile(
                fault.reason, byte_offset=unparsed.offset, bad_records=bad.count, reported=bad.reported
            ) from fault
    records = totals.trips + bad.count
    figure = figure_beyond(totals.contribution, FIGURE_MAX)
    if figure is not None:
        raise InvalidTripFile(
            f"{figure} of the file adds up to {getattr(totals.contribution, figure)}; at most {FIGURE_MAX} is allowed",
            bad_records=bad.count,
            reported=bad.reported,
        )
    if bad.count and not rules.bad_records_max.allows(bad.count, records=records):
        raise TooManyBadRecords(bad.count, bad.reported, records=records)
    return FileTotals(
        contribution=totals.contribution,
        trips_on_other_dates=totals.trips_on_other_dates,
        records=records,
        bad_records=bad.count,
        reported=bad.reported,
        strict_path_records=strict.records,
        rule_version=totals.rule_version,
    )


def _total_records(batch: BatchPath | None, strict: StrictPath, limits: ParserLimits) -> None:
    """Total all records. The longer the batch path declines every window, the less often it is tried."""
    if batch is None:
        strict.total(None)
        return
    stretch_bytes = SMALLEST_WINDOW_BYTES
    more = True
    while more:
        if batch.total():
            stretch_bytes = SMALLEST_WINDOW_BYTES
        more = strict.total(stretch_bytes)
        stretch_bytes = min(2 * stretch_bytes, limits.window_bytes)
