"""Counts the bad records of one file, and keeps the first ones for its report."""

from __future__ import annotations

from typing import Final

from services.ingest.parsing.trip_file import BadRecord, shortened
from services.ingest.parsing.trips import InvalidTrip

BAD_RECORDS_REPORTED_MAX: Final = 100


class BadRecords:
    """Counts the records that break a rule."""

    def __init__(self) -> None:
        self.count = 0
        self._reported: list[BadRecord] = []

    @property
    def reported(self) -> tuple[BadRecord, ...]:
        """The first bad records, at most `BAD_RECORDS_REPORTED_MAX`."""
        return tuple(self._reported)

    def add(self, fault: InvalidTrip, *, record_number: int, byte_offset: int) -> None:
        """Count a bad record."""
        self.count += 1
        if len(self._reported) < BAD_RECORDS_REPORTED_MAX:
            bad = BadRecord(
                record_number=record_number,
                byte_offset=byte_offset,
                field=fault.field,
                value=None if fault.value is None else shortened(fault.value),
                reason=fault.reason,
            )
            self._reported.append(bad)
