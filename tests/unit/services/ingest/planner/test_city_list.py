"""The city list, and the IDs and slugs of cities, countries and requests for any name from an upstream."""

from __future__ import annotations

import datetime as dt
import json
import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.planner.city_list import (
    BAD_CITIES_NAMED_MAX,
    CITY_ID_BYTES_MAX,
    UPSTREAM_ID_LENGTH_MAX,
    InvalidCityList,
    identify_city,
    parse_city_list,
)
from services.ingest.planner.country_slugs import mint_slugs
from shared.domain import events, keys
from shared.domain.events import RequestPlanned
from shared.domain.ids import (
    NAME_LENGTH_MAX,
    SLUG_LENGTH_MAX,
    CityField,
    CountryField,
    CountrySlug,
    RequestField,
    mint_request_id,
    parse_request_id,
    request_time_ms,
)
from shared.domain.objects import Countries

NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)


class Names(msgspec.Struct):
    """The three names, as a decoder checks them."""

    country: CountryField = CountrySlug("armenia")
    city: CityField = "7"  # type: ignore[assignment]  # a plain string stands for a city id here
    request: RequestField = "018f3d2a-5c00-7aaa-8bbb-0123456789ab"  # type: ignore[assignment]  # as above


def city(city_id: object = 1, name: object = "Port Tina", country: object = "Armenia") -> dict[str, object]:
    return {"id": city_id, "name": name, "country": country}


def listing(*entries: object) -> bytes:
    return json.dumps(entries).encode()


def string_ids(length_max: int) -> st.SearchStrategy[str]:
    return st.text(min_size=1, max_size=length_max).filter(lambda value: value not in {".", ".."})


def slug_of(name: str, known: Countries | None = None) -> CountrySlug:
    return mint_slugs(known or Countries(), [name]).slugs[name]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Armenia", "armenia"),
        ("Côte d’Ivoire", "cote-divoire"),
        ("Россия", "rossiia"),
        ("  Åland  ", "aland"),
        ("São Tomé / Príncipe", "sao-tome-principe"),
    ],
)
def test_a_readable_name_is_its_slug(name: str, slug: str) -> None:
    """A name that can be written in ASCII is called so."""
    assert slug_of(name) == slug


@pytest.mark.parametrize("name", ["🇫🇷", "!!!", "-", "—"])
def test_a_name_without_letters_is_a_hash(name: str) -> None:
    """A name of which nothing can be written is a dash and eight hex digits, always the same."""
    slug = slug_of(name)
    assert len(slug) == 9
    assert slug[0] == "-"
    assert slug == slug_of(name)
    assert int(slug[1:], 16) >= 0


def test_two_names_never_share_a_slug() -> None:
    """If two names have the same readable slug, the later one gets a hash."""
    first = mint_slugs(Countries(), ["Россия"])
    both = mint_slugs(first, ["Rossiia"])
    assert both.slugs["Россия"] == "rossiia"
    assert both.slugs["Rossiia"].startswith("rossiia-")
    assert slug_of("Россия", mint_slugs(Countries(), ["Rossiia"])).startswith("rossiia-")


def test_a_name_equal_to_the_hash_slug_of_another_gets_a_longer_hash() -> None:
    """Even a name that is written like the slug of another name gets a slug of its own."""
    taken = mint_slugs(Countries(), ["Rossiia", "Россия"])
    impostor = taken.slugs["Россия"]
    slugs = mint_slugs(taken, [impostor, f"{impostor}!"]).slugs
    assert len(set(slugs.values())) == len(slugs)


def test_a_slug_is_minted_once() -> None:
    """A known name keeps its slug and nothing is written for it."""
    known = mint_slugs(Countries(), ["Armenia", "Brasil"])
    assert mint_slugs(known, ["Brasil"]) is known
    assert mint_slugs(known, ["Chile"]).slugs["Brasil"] == "brasil"


def test_spellings_of_a_country_share_its_slug() -> None:
    """Case and white space around a name make no country of its own; slugs that were minted before stay."""
    known = Countries(slugs={"Chile": CountrySlug("chile"), "CHILE": CountrySlug("chile-1234abcd")})
    slugs = mint_slugs(known, ["ARMENIA", "Armenia", " Armenia ", "chile"]).slugs
    assert {slugs["ARMENIA"], slugs["Armenia"], slugs[" Armenia "]} == {"armenia"}
    assert (slugs["Chile"], slugs["CHILE"]) == ("chile", "chile-1234abcd")
    listed = parse_city_list(listing(city(1, country=" Armenia\t")))
    assert listed.cities[0].country_name == "Armenia"


def test_a_long_name_has_a_short_slug() -> None:
    """A name of 10,000 characters has a slug that a key can hold."""
    assert len(slug_of("ä" * 10_000)) <= 80
    two = mint_slugs(Countries(), ["x" * 10_000, "x" * 10_001]).slugs
    assert len(set(two.values())) == 2
    assert max(map(len, two.values())) <= SLUG_LENGTH_MAX


@given(st.lists(st.text(min_size=1, max_size=100), max_size=8), st.lists(st.text(min_size=1, max_size=100), max_size=8))
def test_each_name_has_its_own_slug(before: list[str], names: list[str]) -> None:
    """Every name has a valid slug of its own, which later names do not change."""
    known = mint_slugs(Countries(), before)
    minted = mint_slugs(known, names)
    assert set(minted.slugs) == {*before, *names}
    comparable = {unicodedata.normalize("NFC", name.strip().casefold()) for name in minted.slugs}
    assert len(set(minted.slugs.values())) == len(comparable)
    assert {name: minted.slugs[name] for name in before} == known.slugs
    for slug in minted.slugs.values():
        msgspec.convert({"country": slug}, Names)
    assert minted == mint_slugs(known, reversed(names))


@pytest.mark.parametrize(
    ("value", "city_id", "upstream_id"),
    [
        (0, "0", "0"),
        (-7, "-7", "-7"),
        (10**39, "1" + "0" * 39, "1" + "0" * 39),
        ("7", "~7", "7"),
        ("Old Town/Süd", "~Old%20Town%2FS%C3%BCd", "Old Town/Süd"),
        ("+x", "~%2Bx", "+x"),
        ("...", "~...", "..."),
    ],
)
def test_a_city_id_is_readable(value: object, city_id: str, upstream_id: str) -> None:
    """Integers are decimal; strings are marked and percent-encoded, so ``7`` and ``"7"`` are two cities."""
    assert identify_city(value) == (city_id, upstream_id)


@pytest.mark.parametrize("value", [None, True, 7.5, "", ".", "..", [], {}, 10**40, "x" * (UPSTREAM_ID_LENGTH_MAX + 1)])
def test_an_invalid_city_id_is_refused(value: object) -> None:
    """Anything but an integer or a string of a sensible length, which a URL's path can hold, is no id."""
    with pytest.raises(ValueError, match="its id"):
        identify_city(value)


@given(st.one_of(st.integers(-(10**38), 10**38), string_ids(UPSTREAM_ID_LENGTH_MAX)))
def test_any_city_id_fits_into_a_key(value: object) -> None:
    """Every ID is valid in events, bounded, and never starts with a plus sign, as chunks of plans do."""
    city_id, _ = identify_city(value)
    msgspec.convert({"city": city_id}, Names)
    assert len(city_id.encode()) <= CITY_ID_BYTES_MAX
    assert not city_id.startswith("+")


@given(string_ids(200), string_ids(200))
def test_different_city_ids_have_different_keys(one: str, other: str) -> None:
    """Different ids are different in keys, hashed ones too."""
    assert (identify_city(one)[0] == identify_city(other)[0]) == (one == other)


@pytest.mark.parametrize(
    "names",
    [
        {"country": "armenia\n"},
        {"country": "Armenia"},
        {"country": ""},
        {"country": "a" * (SLUG_LENGTH_MAX + 1)},
        {"city": "7\n"},
        {"city": "a/b"},
        {"city": "a b"},
        {"request": "018f3d2a-5c00-7aaa-8bbb-0123456789ab\n"},
        {"request": "ffffffff-ffff-7fff-bfff-ffffffffffff"},
        {"request": "018F3D2A-5C00-7AAA-8BBB-0123456789AB"},
    ],
)
def test_an_event_with_an_invalid_name_is_refused(names: dict[str, str]) -> None:
    """An event with a name that no key can hold, not even with a newline at its end, is none."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(names, Names)


def test_a_city_list_keeps_its_order_and_normalizes_names() -> None:
    """A list is read in its order; names are in NFC, and fields that are not asked for are ignored."""
    body = json.dumps([city() | {"mayor": {"name": "T."}}, city("b", "Süd", unicodedata.normalize("NFD", "Åland"))])
    listed = parse_city_list(b"\xef\xbb\xbf" + body.encode())
    assert [(one.city.city_id, one.city.name, one.country_name) for one in listed.cities] == [
        ("1", "Port Tina", "Armenia"),
        ("~b", "Süd", "Åland"),
    ]
    assert listed.bad_cities_count == 0


def test_two_cities_may_have_one_name() -> None:
    """Cities of the same name and country are two, if their ids are."""
    assert len(parse_city_list(listing(city(1), city(2))).cities) == 2


def test_the_first_of_two_cities_with_one_id_counts() -> None:
    """The second city of an id is reported and left out, even if it is in another country."""
    listed = parse_city_list(listing(city(1), city(1, country="Brasil"), city("1", country="Brasil")))
    assert [(one.city.city_id, one.country_name) for one in listed.cities] == [("1", "Armenia"), ("~1", "Brasil")]
    assert [bad.reason for bad in listed.bad_cities] == ["an earlier entry has the id '1' too"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (7, "not an object"),
        ([], "not an object"),
        ({"name": "Port Tina", "country": "Armenia"}, "its id is None"),
        ({"id": 1, "country": "Armenia"}, "its name is None"),
        (city(name=""), "its name is ''"),
        (city(country="  "), "its country is '  '"),
        (city(country=7), "its country is 7"),
        (city(name="x" * (NAME_LENGTH_MAX + 1)), f"its name has {NAME_LENGTH_MAX + 1} characters"),
        (city(country="x" * 10_000), "its country has 10000 characters"),
    ],
)
def test_a_bad_entry_is_left_out_and_reported(entry: object, reason: str) -> None:
    """A bad entry costs no other one, and says why."""
    listed = parse_city_list(listing(entry, city(2)))
    assert [one.city.city_id for one in listed.cities] == ["2"]
    assert listed.bad_cities_count == 1
    assert reason in listed.bad_cities[0].reason


@pytest.mark.parametrize("body", [b"", b"null", b"{}", b'"cities"', b"[{]", b"[", b"\xff", b"[" * 100_000])
def test_an_invalid_city_list_is_refused_as_a_whole(body: bytes) -> None:
    """A body that is not a JSON array is no list of cities."""
    with pytest.raises(InvalidCityList, match="not a JSON array"):
        parse_city_list(body)


def test_an_empty_city_list_is_valid() -> None:
    """A list without cities is valid."""
    assert parse_city_list(b" [] ").cities == ()


@pytest.mark.parametrize("strange", ["\U000e0001", "\u200b", '"', "\\", "ä"])
def test_the_report_of_bad_entries_is_bounded(strange: str) -> None:
    """However long and strange bad entries are, the event that reports them is valid, and names a bounded number."""
    long_id = strange * UPSTREAM_ID_LENGTH_MAX
    entries = [city(long_id)] * (BAD_CITIES_NAMED_MAX + 5)
    listed = parse_city_list(json.dumps(entries, ensure_ascii=False).encode())
    assert listed.bad_cities_count == BAD_CITIES_NAMED_MAX + 4
    assert len(listed.bad_cities) == BAD_CITIES_NAMED_MAX
    planned = RequestPlanned(
        request_id=mint_request_id(NOW),
        date=NOW.date(),
        requested_at=NOW,
        plan_revision=1,
        cities=1,
        countries=1,
        bad_cities_count=listed.bad_cities_count,
        bad_cities=listed.bad_cities,
    )
    assert events.decode(planned.topic, events.encode(planned)) == planned


@given(st.binary(max_size=40), st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=5)), max_size=5))
def test_any_body_is_parsed_or_refused(noise: bytes, values: list[object]) -> None:
    """No body makes anything else happen than a list of cities or its refusal."""
    for body in (noise, b"[" + noise + b"]", listing(*({"id": value} for value in values))):
        try:
            listed = parse_city_list(body)
        except InvalidCityList:
            continue
        assert listed.bad_cities_count >= len(listed.bad_cities)


def test_request_ids_sort_by_time() -> None:
    """A request id carries its time, is valid, differs from every other, and sorts as the times do."""
    ids = [mint_request_id(NOW + dt.timedelta(milliseconds=at)) for at in (0, 0, 1, 1000)]
    assert len(set(ids)) == 4
    assert [one[:13] for one in ids] == sorted(one[:13] for one in ids)
    assert request_time_ms(ids[3]) == int(NOW.timestamp() * 1000) + 1000
    for one in ids:
        assert parse_request_id(one) == one
        msgspec.convert({"request": one}, Names)


@pytest.mark.parametrize(
    "text", ["", "x", "018f3d2a-5c00-4aaa-8bbb-0123456789ab", "018f3d2a-5c00-7aaa-8bbb-0123456789ab\n"]
)
def test_an_invalid_request_id_is_refused(text: str) -> None:
    """Only a UUID of version 7 in lower case is a request id."""
    assert parse_request_id(text) is None


def test_the_latest_request_is_listed_first() -> None:
    """Keys of requests sort from the latest to the earliest, as a listing shows them."""
    ids = [mint_request_id(NOW + dt.timedelta(hours=hour)) for hour in range(3)]
    assert sorted(map(keys.request, ids)) == [keys.request(one) for one in reversed(ids)]
