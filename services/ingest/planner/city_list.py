"""What cities and countries are called in keys, events and URLs. Pure; the planner alone mints these names."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import unicodedata
from collections.abc import Container, Iterable, Iterator
from urllib.parse import quote

import msgspec
from slugify import slugify

from shared.domain.events import BadCity
from shared.domain.ids import NAME_LENGTH_MAX, CityId, CountrySlug
from shared.domain.objects import Countries, PlannedCity

SLUG_READABLE_LENGTH_MAX = 80
CITY_ID_BYTES_MAX = 100
CITIES_MAX = 200_000
BAD_CITIES_NAMED_MAX = 100
UPSTREAM_ID_LENGTH_MAX = 1_000

_INTEGER_DIGITS_MAX = 40
_SHOWN_LENGTH_MAX = 200
_STEPS_IN_A_PATH = {".", ".."}
"""Clients and servers take these out of a URL's path, and out of it even percent-encoded (RFC 3986, 6.2.2)."""

_DECODED_AT_ONCE_BYTES = 1024**2
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_SLUG = re.compile(r"[a-z0-9-]*")


class InvalidCityList(ValueError):
    """The upstream's list of cities is not one at all."""


class ListedCity(msgspec.Struct, frozen=True, kw_only=True):
    """A good entry of the upstream's list, with its country's name trimmed and in NFC."""

    city: PlannedCity
    country_name: str


class CityList(msgspec.Struct, frozen=True, kw_only=True):
    """What the upstream's list holds: its good entries, and the bad ones, the first of which are named."""

    cities: tuple[ListedCity, ...]
    bad_cities: tuple[BadCity, ...]
    bad_cities_count: int


class _BadEntry(ValueError):
    pass


def parse_city_list(body: bytes) -> CityList:
    """Parse ``[{"id": 0, "name": "Port Tina", "country": "Armenia"}, …]``; fields not listed are ignored.

    A bad entry is reported and left out; what is no Unicode makes its entry bad, not the list. Raises InvalidCityList
    if ``body`` is not a JSON array, or too long a one. Never holds the interpreter for long, so that a thread can do it
    beside an event loop.
    """
    text = _decoded(body.removeprefix(b"\xef\xbb\xbf"))
    cities: dict[CityId, ListedCity] = {}
    bad: list[BadCity] = []
    bad_count = 0
    for number, (value, start, end) in enumerate(_entries(text)):
        if number == CITIES_MAX:
            raise InvalidCityList(f"the list of cities has too many entries; at most {CITIES_MAX} are taken")
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
    """Yield the values of a JSON array one by one, each with where it begins and ends; raise InvalidCityList."""
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
    """Return UTF-8 as text. Bytes that are none become lone surrogates, like those that are written with escapes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    starts = range(0, len(body), _DECODED_AT_ONCE_BYTES)
    return "".join(decoder.decode(body[start : start + _DECODED_AT_ONCE_BYTES]) for start in starts) + decoder.decode(
        b"", final=True
    )


def _after_white_space(text: str, at: int) -> int:
    match = _WHITE_SPACE.match(text, at)
    assert match is not None, "no white space is white space"
    return match.end()


def _integer(digits: str) -> object:
    # Longer ones are bad as an id, and cost more than they are worth; elsewhere they are ignored.
    return int(digits) if len(digits) <= 2 * _INTEGER_DIGITS_MAX else float("inf")


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is no number")


_decoder = json.JSONDecoder(parse_int=_integer, parse_constant=_no_number)


def _printable(text: str) -> str:
    """Return text that can be written as UTF-8, in the length that an event has room for."""
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
        raise _BadEntry(f"a city with id {upstream_id!r:.100} came before it")
    name = _name(fields, "name")
    country_name = _name(fields, "country").strip()
    return ListedCity(city=PlannedCity(city_id=city_id, upstream_id=upstream_id, name=name), country_name=country_name)


def identify_city(value: object) -> tuple[CityId, str]:
    """Return a city's id as keys have it, and as the upstream's URL has it.

    Integers are decimal. Strings are ``~`` and percent-encoding, or ``~+`` and a SHA-256 if that is over 100 bytes: no
    percent-encoding holds a plus sign, so the two cannot meet. Raises ValueError for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        digits = str(value)
        if len(digits) > _INTEGER_DIGITS_MAX:
            raise _BadEntry(f"its id has {len(digits)} digits; at most {_INTEGER_DIGITS_MAX} are taken")
        return CityId(digits), digits
    if isinstance(value, str) and value:
        if len(value) > UPSTREAM_ID_LENGTH_MAX:
            raise _BadEntry(f"its id has {len(value)} characters; at most {UPSTREAM_ID_LENGTH_MAX} are taken")
        if not _is_unicode(value):
            raise _BadEntry(f"its id is {value!r:.100}, which is no Unicode")
        if value in _STEPS_IN_A_PATH:
            raise _BadEntry(f"its id is {value!r}, which names no city in a URL but another path")
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
        raise _BadEntry(f"its {field} has {len(value)} characters; at most {NAME_LENGTH_MAX} are taken")
    if not _is_unicode(value):
        raise _BadEntry(f"its {field} is {value!r:.100}, which is no Unicode")
    name = unicodedata.normalize("NFC", value)
    if len(name) > NAME_LENGTH_MAX:
        raise _BadEntry(f"its {field} has {len(name)} characters; at most {NAME_LENGTH_MAX} are taken")
    return name


def mint_slugs(known: Countries, names: Iterable[str]) -> Countries:
    """Give each name in NFC that has none yet a slug. A slug once minted stays; returns ``known`` if none is new.

    Names that differ in case or in the white space around them are one country, with one slug. A slug has at most 80
    readable characters. If it is empty, or belongs to another name, a dash and eight hex digits of the name's SHA-256
    are added (more digits, should even that be taken).
    """
    new = sorted(set(names) - known.slugs.keys())
    if not new:
        return known
    slugs = dict(known.slugs)
    taken = set(slugs.values())
    by_comparable: dict[str, CountrySlug] = {}
    for name, slug in slugs.items():
        by_comparable.setdefault(_comparable(name), slug)
    for name in new:
        if (slug_of_another_spelling := by_comparable.get(_comparable(name))) is not None:
            slugs[name] = slug_of_another_spelling
            continue
        readable = slugify(name, max_length=SLUG_READABLE_LENGTH_MAX)
        slug = CountrySlug(readable if _SLUG.fullmatch(readable) else "")
        digest = hashlib.sha256(name.encode()).hexdigest()
        digits = 8
        while not slug or slug in taken:
            slug = CountrySlug(f"{readable[: SLUG_READABLE_LENGTH_MAX + 8 - digits]}-{digest[:digits]}")
            digits += 8
        slugs[name] = by_comparable[_comparable(name)] = slug
        taken.add(slug)
    return Countries(slugs=dict(sorted(slugs.items())))


def _comparable(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip().casefold())
