"""What cities and countries are called in keys, events and URLs. Pure; the planner alone mints these names."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Container, Iterable
from urllib.parse import quote

import msgspec
from slugify import slugify

from shared.events import BadCity
from shared.identity import NAME_LENGTH_MAX, CityId, CountrySlug
from shared.objects import Countries, PlannedCity

SLUG_READABLE_LENGTH_MAX = 80
CITY_ID_BYTES_MAX = 100
CITIES_MAX = 200_000
BAD_CITIES_NAMED_MAX = 100
UPSTREAM_ID_LENGTH_MAX = 1_000

_INTEGER_DIGITS_MAX = 40
_entries_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_SLUG = re.compile(r"[a-z0-9-]*")


class InvalidCityList(ValueError):
    """The upstream's list of cities is not one at all."""


class ListedCity(msgspec.Struct, frozen=True, kw_only=True):
    """A good entry of the upstream's list, with its country's name in NFC."""

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

    A bad entry is reported and left out. Raises InvalidCityList if ``body`` is not a JSON array, or too long a one.
    """
    try:
        entries = _entries_decoder.decode(body.removeprefix(b"\xef\xbb\xbf"))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidCityList(f"the list of cities is not a JSON array: {error}") from error
    if len(entries) > CITIES_MAX:
        raise InvalidCityList(f"the list of cities has {len(entries)} entries; at most {CITIES_MAX} are taken")
    cities: dict[CityId, ListedCity] = {}
    bad: list[BadCity] = []
    bad_count = 0
    for entry in entries:
        try:
            listed = _parse_entry(entry, cities)
        except _BadEntry as error:
            bad_count += 1
            if len(bad) < BAD_CITIES_NAMED_MAX:
                shown = bytes(entry)[:200].decode(errors="replace")
                bad.append(BadCity(entry=shown, reason=str(error)))
        else:
            cities[listed.city.city_id] = listed
    return CityList(cities=tuple(cities.values()), bad_cities=tuple(bad), bad_cities_count=bad_count)


def _parse_entry(entry: msgspec.Raw, before: Container[CityId]) -> ListedCity:
    try:
        fields = msgspec.json.decode(entry)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _BadEntry(f"not readable: {error}") from error
    if not isinstance(fields, dict):
        raise _BadEntry("not an object with id, name and country")
    city_id, upstream_id = identify_city(fields.get("id"))
    if city_id in before:
        raise _BadEntry(f"a city with id {upstream_id!r:.100} came before it")
    name = _name(fields, "name")
    country_name = _name(fields, "country")
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
        encoded = f"~{quote(value, safe='')}"
        if len(encoded) > CITY_ID_BYTES_MAX:
            encoded = f"~+{hashlib.sha256(value.encode()).hexdigest()}"
        return CityId(encoded), value
    raise _BadEntry(f"its id is {value!r:.100}; expected an integer or a non-empty string")


def _name(fields: dict[str, object], field: str) -> str:
    value = fields.get(field)
    if not isinstance(value, str) or not value.strip():
        raise _BadEntry(f"its {field} is {value!r:.100}; expected a non-empty string")
    name = unicodedata.normalize("NFC", value)
    if len(name) > NAME_LENGTH_MAX:
        raise _BadEntry(f"its {field} has {len(name)} characters; at most {NAME_LENGTH_MAX} are taken")
    return name


def mint_slugs(known: Countries, names: Iterable[str]) -> Countries:
    """Give each name in NFC that has none yet a slug. A slug once minted stays; returns ``known`` if none is new.

    A slug has at most 80 readable characters. If it is empty, or belongs to another name, a dash and eight hex digits
    of the name's SHA-256 are added (more digits, should even that be taken).
    """
    new = sorted(set(names) - known.slugs.keys())
    if not new:
        return known
    slugs = dict(known.slugs)
    taken = set(slugs.values())
    for name in new:
        readable = slugify(name, max_length=SLUG_READABLE_LENGTH_MAX)
        slug = CountrySlug(readable if _SLUG.fullmatch(readable) else "")
        digest = hashlib.sha256(name.encode()).hexdigest()
        digits = 8
        while not slug or slug in taken:
            slug = CountrySlug(f"{readable[: SLUG_READABLE_LENGTH_MAX + 8 - digits]}-{digest[:digits]}")
            digits += 8
        slugs[name] = slug
        taken.add(slug)
    return Countries(slugs=dict(sorted(slugs.items())))
