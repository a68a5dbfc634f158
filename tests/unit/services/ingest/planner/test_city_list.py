"""The city list of an upstream, and the ids of its cities."""

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
from shared.domain import events
from shared.domain.events import RequestPlanned
from shared.domain.ids import (
    NAME_LENGTH_MAX,
    CityField,
    CountrySlug,
    mint_request_id,
)
from shared.domain.objects import Countries

NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)


def city(city_id: object = 1, name: object = "Port Tina", country: object = "Armenia") -> dict[str, object]:
    return {"id": city_id, "name": name, "country": country}


def listing(*entries: object) -> bytes:
    return json.dumps(entries).encode()


def string_ids(length_max: int) -> st.SearchStrategy[str]:
    return st.text(min_size=1, max_size=length_max).filter(lambda value: value not in {".", ".."})


any_ids = st.one_of(st.integers(-20, 20), st.integers(-20, 20).map(str), string_ids(200))


def test_spellings_of_a_country_share_its_slug() -> None:
    """Case and white space around a name make no country of its own; slugs that were minted before stay."""
    known = Countries(slugs={"Chile": CountrySlug("chile"), "CHILE": CountrySlug("chile-1234abcd")})
    slugs = mint_slugs(known, ["ARMENIA", "Armenia", " Armenia ", "chile"]).slugs
    assert {slugs["ARMENIA"], slugs["Armenia"], slugs[" Armenia "]} == {"armenia"}
    assert (slugs["Chile"], slugs["CHILE"]) == ("chile", "chile-1234abcd")
    listed = parse_city_list(listing(city(1, country=" Armenia\t")))
    assert listed.cities[0].country_name == "Armenia"


@pytest.mark.parametrize(
    ("value", "city_id", "upstream_id"),
    [
        (0, "0", "0"),
        (-7, "-7", "-7"),
        (10**39, "1" + "0" * 39, "1" + "0" * 39),
        ("7", "7", "7"),
        ("-7", "-7", "-7"),
        ("07", "~07", "07"),
        ("-0", "~-0", "-0"),
        ("+7", "~%2B7", "+7"),
        ("٧", "~%D9%A7", "٧"),
        ("1" + "0" * 40, "~1" + "0" * 40, "1" + "0" * 40),
        ("Old Town/Süd", "~Old%20Town%2FS%C3%BCd", "Old Town/Süd"),
        ("+x", "~%2Bx", "+x"),
        ("...", "~...", "..."),
    ],
)
def test_a_city_id_is_readable(value: object, city_id: str, upstream_id: str) -> None:
    """Integers are decimal, also as strings: ``7`` and ``"7"`` are one city. Other strings are percent-encoded."""
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
    msgspec.convert(city_id, CityField)
    assert len(city_id.encode()) <= CITY_ID_BYTES_MAX
    assert not city_id.startswith("+")


@given(any_ids, any_ids)
def test_city_ids_are_equal_in_keys_if_they_are_in_urls(one: object, other: object) -> None:
    """Two ids are one city if, and only if, the upstream has one URL for both."""
    assert (identify_city(one)[0] == identify_city(other)[0]) == (str(one) == str(other))


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
    assert [(one.city.city_id, one.country_name) for one in listed.cities] == [("1", "Armenia")]
    assert [bad.reason for bad in listed.bad_cities] == ["an earlier entry has the id '1' too"] * 2


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


@pytest.mark.parametrize("body", [b"", b"null", b"{}", b'"cities"', b"[{]", b"[", b"\xff", b"[" * 100_000, b"[]\xe2"])
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
