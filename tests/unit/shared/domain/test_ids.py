"""Ids and slugs: what an event accepts, and the order of request ids."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from shared.domain import keys
from shared.domain.ids import (
    SLUG_LENGTH_MAX,
    CityField,
    CountryField,
    CountrySlug,
    RequestField,
    mint_request_id,
    parse_request_id,
    request_time_ms,
)

NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)


class Names(msgspec.Struct):
    """The three names, as a decoder checks them."""

    country: CountryField = CountrySlug("armenia")
    city: CityField = "7"  # type: ignore[assignment]  # a plain string stands for a city id here
    request: RequestField = "018f3d2a-5c00-7aaa-8bbb-0123456789ab"  # type: ignore[assignment]  # as above


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
