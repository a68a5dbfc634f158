"""Counting a stored trip file again, with the standard library's JSON decoder and arithmetic of its own.

It is slower and simpler than the ingest's parser on purpose and shares no code with it, so that a mistake in one is
not repeated in the other. The file was accepted once: here only what it adds up to is asked, not every rule.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from fractions import Fraction
from typing import Any

import msgspec

RECORD_CHARACTERS_MAX = 16 * 1024 * 1024
DELAYS_KEPT_MAX = 65_536

_NUMBER = r"([+-]?\d+(?:[.,]\d+)?)"
_DURATION = re.compile(
    rf"([+-])?P(?:{_NUMBER}W)?(?:{_NUMBER}D)?(?:T(?:{_NUMBER}H)?(?:{_NUMBER}M)?(?:{_NUMBER}S)?)?", re.ASCII
)
_UNITS_S = (604_800, 86_400, 3_600, 60, 1)
_WHITE_SPACE = " \t\r\n"


class NotCountable(ValueError):
    """The file is not an array of trips that can be counted: the message says where it stops being one."""


class Recount(msgspec.Struct, frozen=True, kw_only=True):
    """What a raw object holds."""

    sha256: str
    size_bytes: int
    trips: int
    passengers: int
    accidents: int
    delay_total_ms: int
    trips_on_other_dates: int


class Counter:
    """Counts one file of one date (``YYYY-MM-DD``), fed chunk by chunk. No more than one record and a chunk is kept."""

    def __init__(self, date: str) -> None:
        self._date = date
        self._sha256 = hashlib.sha256()
        self._size_bytes = 0
        self._text = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._rest = ""
        self._opened = False
        self._ended = False
        self._delays_ms: dict[str, int] = {}
        self._sums = [0, 0, 0, 0]
        self._on_other_dates = 0

    def feed(self, chunk: bytes) -> None:
        """Count the records that end in this chunk. Raises NotCountable."""
        self._sha256.update(chunk)
        self._size_bytes += len(chunk)
        self._take(self._decode(chunk, last=False))

    def end(self) -> Recount:
        """Return what the whole file holds. Raises NotCountable if it stops in its middle."""
        self._take(self._decode(b"", last=True))
        if not self._ended:
            raise NotCountable(f"the file ends inside its array, after {self._sums[0]} trips")
        trips, passengers, accidents, delay_total_ms = self._sums
        return Recount(
            sha256=self._sha256.hexdigest(),
            size_bytes=self._size_bytes,
            trips=trips,
            passengers=passengers,
            accidents=accidents,
            delay_total_ms=delay_total_ms,
            trips_on_other_dates=self._on_other_dates,
        )

    def _decode(self, chunk: bytes, *, last: bool) -> str:
        try:
            return self._text.decode(chunk, last)
        except UnicodeDecodeError as error:
            raise NotCountable(f"not UTF-8 after {self._sums[0]} trips: {error.reason}") from error

    def _take(self, more: str) -> None:
        text = self._rest + more
        place = 0
        while not self._ended:
            place = _skip(text, place)
            if place == len(text):
                break
            if not self._opened:
                self._expect(text[place] == "[", "an array")
                self._opened = True
                place += 1
            elif text[place] == "]":
                self._ended = True
                place += 1
            elif text[place] == "," and self._sums[0]:
                place += 1
            else:
                self._expect(text[place] == "{", "a trip")
                try:
                    record, place = self._json.raw_decode(text, place)
                except json.JSONDecodeError as error:
                    if len(text) - place > RECORD_CHARACTERS_MAX:
                        raise NotCountable(f"trip {self._sums[0] + 1} is not JSON: {error}") from error
                    break  # it may end in a later chunk
                self._count(record)
        self._rest = text[place:]
        self._expect(not self._ended or not self._rest.strip(_WHITE_SPACE), "nothing after the array")

    def _count(self, record: dict[str, Any]) -> None:
        sums = self._sums
        try:
            sums[3] += self._milliseconds(record["delay"])
            sums[1] += record["passengers"]
            sums[2] += record["accident"] is True
            self._on_other_dates += record["departure-time"][:10] != self._date
        except (KeyError, TypeError, ValueError) as error:
            raise NotCountable(f"trip {sums[0] + 1} cannot be counted: {type(error).__name__} {error}") from error
        sums[0] += 1

    def _milliseconds(self, duration: str) -> int:
        known = self._delays_ms.get(duration)
        if known is None:
            if len(self._delays_ms) >= DELAYS_KEPT_MAX:
                self._delays_ms.clear()
            known = self._delays_ms[duration] = _milliseconds(duration)
        return known

    def _expect(self, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise NotCountable(f"expected {what} after {self._sums[0]} trips")


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _WHITE_SPACE:
        place += 1
    return place


def _milliseconds(duration: str) -> int:
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{duration!r} is not a duration")
    sign, *numbers = match.groups()
    seconds = sum(
        Fraction(number.replace(",", ".")) * unit for number, unit in zip(numbers, _UNITS_S, strict=True) if number
    )
    return round((-seconds if sign == "-" else seconds) * 1000)  # of a Fraction: half to even
