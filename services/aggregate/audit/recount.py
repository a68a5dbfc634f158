"""Counts a stored trip file again, with the JSON decoder of the standard library and its own arithmetic.

It shares no code with the parser of ingest, so a mistake in one is not repeated in the other. It is slower and simpler
on purpose. It checks every rule of a trip, since ingest may have left bad records out.
"""

from __future__ import annotations

import codecs
import datetime as dt
import hashlib
import json
import re
from fractions import Fraction
from typing import Any

import msgspec

from shared.domain.file_rules import RecordsForm

RECORD_CHARACTERS_MAX = 16 * 1024 * 1024
DELAYS_KEPT_MAX = 65_536

_NUMBER = r"([+-]?\d+(?:[.,]\d+)?)"
_DURATION = re.compile(
    rf"([+-])?P(?:{_NUMBER}W)?(?:{_NUMBER}D)?(?:T(?=.)(?:{_NUMBER}H)?(?:{_NUMBER}M)?(?:{_NUMBER}S)?)?", re.ASCII
)
_FRACTION_BEFORE_THE_LAST = re.compile(r"[.,]\d+[WDHM].")
_UNITS_S = (604_800, 86_400, 3_600, 60, 1)
_LONGEST_S = 366 * 86_400
_DEPARTURE = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d+)?)?([Zz]|[+-]([01]\d|2[0-3]):?[0-5]\d)?", re.ASCII
)
_WHITE_SPACE = " \t\r\n"


ARRAY = RecordsForm()


class AuditParseError(ValueError):
    """The file does not have the expected form; the message says where."""


class Recount(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a raw object. ``first_bad`` says what is wrong with the first bad record."""

    sha256: str
    size_bytes: int
    trips: int
    passengers: int
    accidents: int
    delay_total_ms: int
    trips_on_other_dates: int
    bad_records: int
    first_bad: str


class AuditParser:
    """Counts a file of one date (``YYYY-MM-DD``) chunk by chunk. At most one record and a chunk are in memory."""

    def __init__(self, date: str, *, form: RecordsForm = ARRAY, other_dates_are_bad: bool = False) -> None:
        self._date = date
        self._form = form
        self._other_dates_are_bad = other_dates_are_bad
        self._sha256 = hashlib.sha256()
        self._size_bytes = 0
        self._text = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._rest = ""
        self._before = ""
        self._opened = form.is_lines
        self._ended = False
        self._delays_ms: dict[str, int] = {}
        self._sums = [0, 0, 0, 0]
        self._on_other_dates = 0
        self._bad_records = 0
        self._first_bad = ""

    @property
    def _records(self) -> int:
        return self._sums[0] + self._bad_records

    def feed(self, chunk: bytes) -> None:
        """Count the records that end in this chunk. Raises AuditParseError."""
        self._sha256.update(chunk)
        self._size_bytes += len(chunk)
        self._take(self._decode(chunk, last=False))

    def end(self) -> Recount:
        """Return the figures of the whole file. Raises AuditParseError if the file is truncated."""
        self._take(self._decode(b"", last=True) + "\n")
        if not self._form.is_lines:
            self._expect(self._ended, "the end of the array")
            self._close()
        trips, passengers, accidents, delay_total_ms = self._sums
        return Recount(
            sha256=self._sha256.hexdigest(),
            size_bytes=self._size_bytes,
            trips=trips,
            passengers=passengers,
            accidents=accidents,
            delay_total_ms=delay_total_ms,
            trips_on_other_dates=self._on_other_dates,
            bad_records=self._bad_records,
            first_bad=self._first_bad,
        )

    def _decode(self, chunk: bytes, *, last: bool) -> str:
        try:
            return self._text.decode(chunk, last)
        except UnicodeDecodeError as error:
            raise AuditParseError(f"not UTF-8 after {self._records} records: {error.reason}") from error

    def _take(self, more: str) -> None:
        text = self._rest + more
        place = 0 if self._opened else self._open(text)
        if self._form.is_lines:
            place = self._take_lines(text)
        elif self._opened:
            place = self._take_array(text, place)
        self._rest = text[place:]
        if len(self._rest) > RECORD_CHARACTERS_MAX:
            raise AuditParseError(f"the text after {self._records} records is too long")

    def _open(self, text: str) -> int:
        """Find the opening bracket of the array; return the position after it, or 0 if it has not arrived."""
        try:
            place = self._find_array(text)
        except (IndexError, json.JSONDecodeError):
            return 0  # it may come in a later chunk
        self._opened = True
        self._before = text[:place]
        return place

    def _find_array(self, text: str) -> int:
        place = 0
        for key in self._form.path:
            place = _skip(text, place)
            self._expect(text[place] == "{", "an object")
            place = self._find_member(text, place + 1, key)
        place = _skip(text, place)
        self._expect(text[place] == "[", "an array")
        return place + 1

    def _find_member(self, text: str, place: int, wanted: str) -> int:
        while True:
            key, place = self._json.raw_decode(text, _skip(text, place))
            place = _skip(text, place)
            self._expect(text[place] == ":", "a colon")
            place = _skip(text, place + 1)
            if key == wanted:
                return place
            _, place = self._json.raw_decode(text, place)
            place = _skip(text, place)
            self._expect(text[place] == ",", f"the key {wanted!r}")
            place += 1

    def _take_array(self, text: str, place: int) -> int:
        while not self._ended:
            place = _skip(text, place)
            if place == len(text):
                break
            if text[place] == "]":
                self._ended = True
                break
            if text[place] == "," and self._records:
                place += 1
                continue
            try:
                record, end = self._json.raw_decode(text, place)
            except json.JSONDecodeError as error:
                if len(text) - place > RECORD_CHARACTERS_MAX:
                    raise AuditParseError(f"record {self._records + 1} is not JSON: {error}") from error
                break  # it may end in a later chunk
            if end == len(text):
                break  # a number may go on in a later chunk
            self._count(record)
            place = end
        return place

    def _take_lines(self, text: str) -> int:
        end = text.rfind("\n") + 1
        for line in text[:end].split("\n"):
            if line.strip(_WHITE_SPACE):
                try:
                    self._count(json.loads(line))
                except json.JSONDecodeError as error:
                    raise AuditParseError(f"record {self._records + 1} is not JSON: {error}") from error
        return end

    def _close(self) -> None:
        """Check that the text around the array is JSON."""
        try:
            json.loads(self._before + self._rest)
        except json.JSONDecodeError as error:
            raise AuditParseError(f"expected the end of the document after {self._records} records: {error}") from error

    def _count(self, record: Any) -> None:
        try:
            passengers, accident, delay_ms, elsewhere = self._read(record)
        except (KeyError, TypeError, ValueError) as error:
            self._first_bad = self._first_bad or f"record {self._records + 1}: {_reason_of(error)}"
            self._bad_records += 1
            return
        for place, summand in enumerate((1, passengers, accident, delay_ms)):
            self._sums[place] += summand
        self._on_other_dates += elsewhere

    def _read(self, record: Any) -> tuple[int, bool, int, bool]:
        """Return a trip's passengers, accident and delay, and whether it is on another date. Raises if it is bad."""
        departure, passengers, accident = record["departure-time"], record["passengers"], record["accident"]
        _require(isinstance(record["bus-type"], str), "bus-type is not a text")
        _require(
            type(passengers) is int and 0 <= passengers <= 1_000_000,
            "passengers is not a whole number from 0 to 1000000",
        )
        _require(isinstance(accident, bool), "accident is not true or false")
        _require(bool(_DEPARTURE.fullmatch(departure)), "departure-time is not a time")
        date = dt.date.fromisoformat(departure[:10]).isoformat()
        _require(
            date == self._date or not self._other_dates_are_bad, f"departure-time is on {date}, not on {self._date}"
        )
        return passengers, accident, self._milliseconds(record["delay"]), date != self._date

    def _milliseconds(self, duration: str) -> int:
        known = self._delays_ms.get(duration)
        if known is None:
            if len(self._delays_ms) >= DELAYS_KEPT_MAX:
                self._delays_ms.clear()
            known = self._delays_ms[duration] = _milliseconds(duration)
        return known

    def _expect(self, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise AuditParseError(f"expected {what} after {self._records} records")


def _reason_of(error: Exception) -> str:
    match error:
        case KeyError():
            return f"{error.args[0]} is missing"
        case TypeError():
            return "a value has the wrong type"
        case _:
            return str(error)


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _WHITE_SPACE:
        place += 1
    return place


def _require(fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise ValueError(what)


def _milliseconds(duration: str) -> int:
    match = _DURATION.fullmatch(duration)
    if match is None or len(duration) > 64 or duration.endswith("P") or _FRACTION_BEFORE_THE_LAST.search(duration):
        raise ValueError(f"{duration!r} is not a duration")
    sign, *numbers = match.groups()
    seconds = sum(
        (Fraction(number.replace(",", ".")) * unit for number, unit in zip(numbers, _UNITS_S, strict=True) if number),
        start=Fraction(0),
    )
    if abs(seconds) > _LONGEST_S:
        raise ValueError(f"{duration!r} is too long")
    return round((-seconds if sign == "-" else seconds) * 1000)  # of a Fraction: half to even
