"""The strict path: reads any file record by record, and decides which records and files are invalid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from services.ingest.parsing.bad_records import BadRecords
from services.ingest.parsing.json_events import json_events
from services.ingest.parsing.record_reader import RecordReader, RecordText
from services.ingest.parsing.totals import TripTotals
from services.ingest.parsing.trip_file import FileFault, InvalidTripFile, UnparsedBytes
from services.ingest.parsing.trips import FIELD_NAMES, InvalidTrip, parse_trip

BATCH_BYTES: Final = 16 * 1024

_SCALARS: Final = frozenset({"string", "number", "boolean", "null"})
_OPENERS: Final = frozenset({"start_map", "start_array"})

Value = dict[str, Any] | InvalidTrip
"""The trip fields of a record, or the fault of a record that is not an object."""


class StrictPath:
    """Totals the records of a reader, and counts the records that break a rule as bad."""

    def __init__(
        self,
        unparsed: UnparsedBytes,
        reader: RecordReader,
        totals: TripTotals,
        bad: BadRecords,
        progress: Callable[[int], None],
    ) -> None:
        self._unparsed = unparsed
        self._reader = reader
        self._totals = totals
        self._bad = bad
        self._progress = progress
        self.records = 0

    def total(self, stretch_bytes: int | None) -> bool:
        """Total records until `stretch_bytes` are passed, or all for ``None``. Return whether more records follow.

        Raises `InvalidTripFile` for a fault that ends the file, and the errors of reading.
        """
        stop = None if stretch_bytes is None else self._unparsed.offset + stretch_bytes
        more = True
        while more and (stop is None or self._unparsed.offset < stop):
            size_bytes = BATCH_BYTES if stop is None else min(BATCH_BYTES, stop - self._unparsed.offset)
            batch: list[RecordText] = []
            try:
                more = self._take_batch(batch, size_bytes)
            except FileFault as fault:
                self._total_batch(batch)
                raise self._refusal(fault.reason, self._unparsed.offset) from fault
            self._total_batch(batch)
            self._progress(self._totals.trips)
        return more

    def _refusal(self, reason: str, byte_offset: int) -> InvalidTripFile:
        """Return the error that ends the file, with the bad records found so far."""
        return InvalidTripFile(
            reason,
            byte_offset=byte_offset,
            record_number=self._next_number,
            bad_records=self._bad.count,
            reported=self._bad.reported,
        )

    @property
    def _next_number(self) -> int:
        return self._totals.trips + self._bad.count + 1

    def _take_batch(self, batch: list[RecordText], size_bytes: int) -> bool:
        """Take records of `size_bytes`, or up to an unfinished one. Return whether more records may follow."""
        while size_bytes > 0:
            record = self._reader.take()
            if record is None:
                return False
            batch.append(record)
            if record.unfinished is not None:
                return False
            size_bytes -= len(record.text)
        return True

    def _total_batch(self, batch: list[RecordText]) -> None:
        """Total these records: all at once if they are valid JSON, or one by one up to the one that ends the file."""
        if not batch:
            return
        if batch[-1].unfinished is None:
            try:
                self._add(batch, _values(b",".join([record.text for record in batch])))
            except FileFault:
                pass
            else:
                return
        for record in batch:
            try:
                values = _values(record.text, record.unfinished)
            except FileFault as fault:
                raise self._refusal(fault.reason, record.offset) from fault
            self._add([record], values)

    def _add(self, batch: list[RecordText], values: list[Value]) -> None:
        self.records += len(batch)
        for record, value in zip(batch, values, strict=True):
            try:
                if isinstance(value, InvalidTrip):
                    raise value
                self._totals.add(parse_trip(value))
            except InvalidTrip as fault:
                self._bad.add(fault, record_number=self._next_number, byte_offset=record.offset)


def _values(texts: bytes, unfinished: str | None = None) -> list[Value]:
    """Parse values that are separated by commas. It keeps only the type of nested values.

    Raises `FileFault`.
    """
    values: list[Value] = []
    record: dict[str, Any] = {}
    in_object = False
    key = ""
    depth = 0
    for event, value in json_events(b"[" + texts if unfinished else b"[%b]" % texts, unfinished):
        if event == "map_key":
            key = value
        elif event in _SCALARS:
            if depth == 1:
                values.append(InvalidTrip("expected an object for a trip", value=value))
            elif depth == 2 and in_object and key in FIELD_NAMES:
                record[key] = value
        elif event in _OPENERS:
            if depth == 1:
                in_object = event == "start_map"
                record = {}
                values.append(record if in_object else InvalidTrip("expected an object for a trip, got an array"))
            elif depth == 2 and in_object and key in FIELD_NAMES:
                record[key] = {} if event == "start_map" else []
            depth += 1
        else:
            depth -= 1
    return values
