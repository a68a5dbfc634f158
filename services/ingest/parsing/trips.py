"""The rules of a trip: the valid values of each field of a record, and their meaning.

Both parser paths use these rules, so a delay and a departure date have one meaning.

- **delay**: an ISO 8601 duration of weeks, days, hours, minutes and seconds in that order, in upper case
  (``PT4080S``, ``P1DT2H``, ``PT1M30.5S``). The duration (``-PT5M``) and each number (``PT-4080S``, ``PT-1H-8M``)
  may have a sign; the two multiply, as in ``java.time.Duration``. The last number may have a fraction, after a
  point or a comma. Years and months are refused, because they have no fixed length. Lower case is refused, because
  ISO 8601 has none and an accepted spelling could never be refused later. More than 366 days are refused. The
  result is whole milliseconds, rounded once, half to even.
- **departure-time**: ``YYYY-MM-DDTHH:MM``, with seconds, a fraction of them and an offset if the upstream
  writes them. As in RFC 3339, ``t`` or a space may replace ``T``, and ``z`` may replace ``Z``. The date of a trip
  is its first ten characters: no offset changes it, and no fraction rounds it to the next day.
- **passengers**: an integer from 0 to 1,000,000, written without fraction or exponent.
- **bus-type**: any string. **accident**: ``true`` or ``false``.

All five fields are required. If a name occurs twice, the last one counts. Other fields are ignored, but they must be
JSON in UTF-8, and no number may have more than 640 digits in a row.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Final

import msgspec

from shared.domain.contribution import round_half_even

RULE_VERSION: Final = 1
"""The version of these rules. Raise it with every change that changes the totals of a file."""


def rule_version() -> int:
    """Return the version of the rules in force.

    Rules that fill a field of a new schema version are not in force before `schema.written_version` is that version.
    """
    return RULE_VERSION


PASSENGERS_MAX: Final = 1_000_000
DELAY_MAX_MS: Final = 366 * 86_400_000
DELAY_MAX_CHARACTERS: Final = 64

Passengers = Annotated[int, msgspec.Meta(ge=0, le=PASSENGERS_MAX)]


class Trip(msgspec.Struct, frozen=True, gc=False, rename="kebab"):
    """One bus departure with the upstream's texts, which `delay_ms` and `departure_date` parse."""

    departure_time: str
    bus_type: str
    passengers: Passengers
    delay: str
    accident: bool


class DatedTrip(msgspec.Struct, frozen=True, gc=False, rename="kebab"):
    """The same record with a departure time that the decoder parses, which is faster.

    `departure_date` accepts every time that the decoder accepts, with two exceptions that the caller must exclude. The
    decoder stops reading a time at an escaped NUL, and it rounds fractions to microseconds.
    """

    departure_time: datetime
    bus_type: str
    passengers: Passengers
    delay: str
    accident: bool


class PlainTrip(DatedTrip, frozen=True, gc=False, rename="kebab", forbid_unknown_fields=True):
    """The same record without other fields, so the decoder skips nothing unchecked."""


class InvalidTrip(ValueError):
    """A record breaks a rule: `field` (``None`` for the record as a whole), its `value` and the `reason`."""

    def __init__(self, reason: str, *, field: str | None = None, value: object = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field
        self.value = value


_NUMBER = r"[+-]?[0-9]+(?:[.,][0-9]+)?"
_DURATION = re.compile(
    rf"([+-]?)P(?:({_NUMBER})W)?(?:({_NUMBER})D)?(T(?:({_NUMBER})H)?(?:({_NUMBER})M)?(?:({_NUMBER})S)?)?"
)
_UNITS_MS: Final = (7 * 86_400_000, 86_400_000, 3_600_000, 60_000, 1_000)

_DEPARTURE = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:\.[0-9]+)?)?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9])?"
)


def delay_ms(written: str) -> int:
    """Return a delay in whole milliseconds, negative for an early departure.

    Raises `InvalidTrip` if it is not a valid duration.
    """
    if len(written) > DELAY_MAX_CHARACTERS:
        raise _bad_delay(written, f"a duration has at most {DELAY_MAX_CHARACTERS} characters")
    match = _DURATION.fullmatch(written)
    if match is None:
        raise _bad_delay(written, "expected a duration of W, D, T, H, M and S, such as PT1H8M or -PT90S")
    sign, weeks, days, time, hours, minutes, seconds = match.groups()
    if time == "T":
        raise _bad_delay(written, "nothing follows the T of the duration")
    numbers = [
        (number, unit_ms)
        for number, unit_ms in zip((weeks, days, hours, minutes, seconds), _UNITS_MS, strict=True)
        if number is not None
    ]
    if not numbers:
        raise _bad_delay(written, "the duration names no time")
    whole_ms = 0
    for number, unit_ms in numbers[:-1]:
        if not number.lstrip("+-").isdecimal():
            raise _bad_delay(written, "only the last number of a duration may have a fraction")
        whole_ms += int(number) * unit_ms
    last, unit_ms = numbers[-1]
    digits, _, fraction = last.replace(",", ".").partition(".")
    scale = 10 ** len(fraction)
    scaled_ms = whole_ms * scale + int(digits + fraction) * unit_ms
    if abs(scaled_ms) > DELAY_MAX_MS * scale:
        raise _bad_delay(written, "a delay is at most 366 days either way")
    return round_half_even(-scaled_ms if sign == "-" else scaled_ms, scale)


def departure_date(written: str) -> str:
    """Return the date in a departure time, as ``YYYY-MM-DD``.

    Raises `InvalidTrip` if it is not a valid date and time.
    """
    match = _DEPARTURE.fullmatch(written)
    if match is None:
        raise InvalidTrip("expected a date and time such as 2024-05-01T01:23:00", field="departure-time", value=written)
    day = match[1]
    try:
        date.fromisoformat(day)
    except ValueError as error:
        raise InvalidTrip(f"no such date: {error}", field="departure-time", value=written) from error
    return day


def parse_trip(record: dict[str, Any]) -> Trip:
    """Convert the trip fields of a record. Raises `InvalidTrip` if one has the wrong type or value."""
    try:
        return msgspec.convert(record, Trip)
    except msgspec.ValidationError as error:
        raise _first_fault(record) from error


FIELDS: Final = msgspec.structs.fields(Trip)
FIELD_NAMES: Final = frozenset(field.encode_name for field in FIELDS)


def _first_fault(record: dict[str, Any]) -> InvalidTrip:
    for field in FIELDS:
        name = field.encode_name
        if name not in record:
            return InvalidTrip("the field is missing", field=name)
        value = record[name]
        try:
            # A message must not mention Decimal: for the upstream, a number with a fraction is a float.
            msgspec.convert(float(value) if isinstance(value, Decimal) else value, field.type)
        except msgspec.ValidationError as error:
            return InvalidTrip(str(error), field=name, value=value)
    raise AssertionError(f"a record of valid fields was refused: {record!r:.200}")


def _bad_delay(written: str, reason: str) -> InvalidTrip:
    return InvalidTrip(reason, field="delay", value=written)
