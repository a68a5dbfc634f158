"""Parses the upstream's city list, and gives each city its ID in keys, events and URLs. Pure."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import unicodedata
from collections.abc import Container, Iterator
from urllib.parse import quote

import msgspec

from shared.domain.events import BadCity
from shared.domain.ids import NAME_LENGTH_MAX, CityId
from shared.domain.objects import PlannedCity

CITY_ID_BYTES_MAX = 100
CITIES_MAX = 200_000
BAD_CITIES_NAMED_MAX = 100
UPSTREAM_ID_LENGTH_MAX = 1_000

_INTEGER_DIGITS_MAX = 40
_SHOWN_LENGTH_MAX = 200
_DOT_SEGMENTS = {".", ".."}
"""Clients and servers remove these from the path of a URL, even percent-encoded (RFC 3986, 6.2.2)."""

_DECODE_CHUNK_BYTES = 1024**2
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")


class InvalidCityList(ValueError):
    """The upstream's response is not a list of cities."""


class ListedCity(msgspec.Struct, frozen=True, kw_only=True):
    """A valid entry of the city list, with its country's name trimmed and in NFC."""

    city: PlannedCity
    country_name: str


class CityList(msgspec.Struct, frozen=True, kw_only=True):
    """The valid entries of the city list, the count of bad entries, and the first bad entries with their reasons."""

    cities: tuple[ListedCity, ...]
    bad_cities: tuple[BadCity, ...]
    bad_cities_count: int


class NoCities(InvalidCityList):
    """The city list has no valid entry."""

    def __init__(self, listed: CityList) -> None:
        fault = "it is empty"
        if listed.bad_cities_count:
            first = listed.bad_cities[0]
            fault = (
                f"none of its {listed.bad_cities_count} entries is a city; the first is {first.entry}: {first.reason}"
            )
        super().__init__(f"{fault}; set TRIPFOLD_UPSTREAM_ALLOW_EMPTY_CITY_LIST=true if a date may have no cities")
        self.listed = listed


class _BadEntry(ValueError):
    pass


def parse_city_list(body: bytes) -> CityList:
    """Parse ``[{"id": 0, "name": "Port Tina", "country": "Armenia"}, …]``; fields not listed are ignored.

    A bad entry is reported and skipped; invalid Unicode makes the entry bad, not the list. Raises InvalidCityList if
    ``body`` is not a JSON array, or is too long. Never holds the GIL for long, so it can run in a thread beside an
    event loop.
    """
    text = _decoded(body.removeprefix(b"\xef\xbb\xbf"))
    cities: dict[CityId, ListedCity] = {}
    bad: list[BadCity] = []
    bad_count = 0
    for number, (value, start, end) in enumerate(_entries(text)):
        if number == CITIES_MAX:
            raise InvalidCityList(f"the list of cities has too many entries; at most {CITIES_MAX} are allowed")
        try:
            listed = _parse_entry(value, cities)
        except _BadEntry as error:
            bad_count += 1
            if len(bad) < BAD_CITIES_NAMED_MAX:
                shown = text[start : min(end, start + _SHOWN_LENGTH_MAX)]
                bad.append(BadCity(entry=_printable(shown), reason=_printable(str(error))))
        else:
            cities[listed.city.city_id] = listed
    return CityList(cities=tuple(cities.values()), bad_cities=tuple(bad), bad_cities_count=bad_count)


def _entries(text: str) -> Iterator[tuple[object, int, int]]:
    """Yield each value of a JSON array with its start and end. Raises InvalidCityList."""
    at = _after_white_space(text, 0)
    if text[at : at + 1] != "[":
        raise InvalidCityList("the list of cities is not a JSON array")
    at = _after_white_space(text, at + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        try:
            value, end = _decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InvalidCityList(f"the list of cities is not a JSON array: {error}"[:500]) from error
        yield value, at, end
        at = _after_white_space(text, end)
        if text[at : at + 1] not in {",", "]"}:
            raise InvalidCityList(f"the list of cities is not a JSON array: no comma at character {at}")
        closed = text[at] == "]"
        at = at if closed else _after_white_space(text, at + 1)
    if _after_white_space(text, at + 1) != len(text):
        raise InvalidCityList(f"the list of cities is not a JSON array: more comes after it, at character {at}")


def _decoded(body: bytes) -> str:
    """Decode UTF-8. Invalid bytes become lone surrogates, as escaped lone surrogates do."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    starts = range(0, len(body), _DECODE_CHUNK_BYTES)
    return "".join(decoder.decode(body[start : start + _DECODE_CHUNK_BYTES]) for start in starts) + decoder.decode(
        b"", final=True
    )


def _after_white_space(text: str, at: int) -> int:
    match = _WHITE_SPACE.match(text, at)
    assert match is not None, "the pattern matches an empty string"
    return match.end()


def _integer(digits: str) -> object:
    # Converting longer numbers is slow. As an ID they are invalid, and in other fields they are ignored.
    return int(digits) if len(digits) <= 2 * _INTEGER_DIGITS_MAX else float("inf")


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


_decoder = json.JSONDecoder(parse_int=_integer, parse_constant=_no_number)


def _printable(text: str) -> str:
    """Return text that encodes to UTF-8, cut to the length that an event allows."""
    return text.encode(errors="backslashreplace").decode()[:_SHOWN_LENGTH_MAX]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_entry(fields: object, before: Container[CityId]) -> ListedCity:
    if not isinstance(fields, dict):
        raise _BadEntry("not an object with id, name and country")
    city_id, upstream_id = identify_city(fields.get("id"))
    if city_id in before:
        raise _BadEntry(f"an earlier entry has the id {upstream_id!r:.100} too")
    name = _name(fields, "name")
    country_name = _name(fields, "country").strip()
    return ListedCity(city=PlannedCity(city_id=city_id, upstream_id=upstream_id, name=name), country_name=country_name)


def identify_city(value: object) -> tuple[CityId, str]:
    """Return a city's ID as used in keys, and as used in the upstream's URL.

    An integer becomes its decimal digits, and so does a string of these digits: ``7`` and ``"7"`` have one URL, so they
    are one city. Any other string becomes ``~`` and its percent-encoding, or ``~+`` and a SHA-256 if that is over 100
    bytes. Percent-encoding never contains a plus sign, so the forms cannot collide.

    Raises ValueError for anything else.
    """
    if isinstance(value, str) and len(value) <= _INTEGER_DIGITS_MAX and _INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        digits = str(value)
        if len(digits) > _INTEGER_DIGITS_MAX:
            raise _BadEntry(f"its id has {len(digits)} digits; at most {_INTEGER_DIGITS_MAX} are allowed")
        return CityId(digits), digits
    if isinstance(value, str) and value:
        if len(value) > UPSTREAM_ID_LENGTH_MAX:
            raise _BadEntry(f"its id has {len(value)} characters; at most {UPSTREAM_ID_LENGTH_MAX} are allowed")
        if not _is_unicode(value):
            raise _BadEntry(f"its id is {value!r:.100}, which is not valid Unicode")
        if value in _DOT_SEGMENTS:
            raise _BadEntry(f"its id is {value!r}, which is a dot segment in a URL")
        encoded = f"~{quote(value, safe='')}"
        if len(encoded) > CITY_ID_BYTES_MAX:
            encoded = f"~+{hashlib.sha256(value.encode()).hexdigest()}"
        return CityId(encoded), value
    raise _BadEntry(f"its id is {value!r:.100}; expected an integer or a non-empty string")


def _name(fields: dict[str, object], field: str) -> str:
    value = fields.get(field)
    if not isinstance(value, str) or not value.strip():
        raise _BadEntry(f"its {field} is {value!r:.100}; expected a non-empty string")
    if len(value) > 4 * NAME_LENGTH_MAX:
        raise _BadEntry(f"its {field} has {len(value)} characters; at most {NAME_LENGTH_MAX} are allowed")
    if not _is_unicode(value):
        raise _BadEntry(f"its {field} is {value!r:.100}, which is not valid Unicode")
    name = unicodedata.normalize("NFC", value)
    if len(name) > NAME_LENGTH_MAX:
        raise _BadEntry(f"its {field} has {len(name)} characters; at most {NAME_LENGTH_MAX} are allowed")
    return name
