"""The reference upstream's files: repeatable, exact, readable from anywhere, and cheap at any size."""

from __future__ import annotations

import hashlib
import re
import tracemalloc
from collections import Counter
from datetime import date, timedelta
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tripfold.local.trip_files import (
    BLOCKS_IN_CYCLE,
    CITY_NAMES,
    COUNTRY_NAMES,
    TRIPS_PER_BLOCK,
    NoTripFileError,
    UpstreamOptions,
    block_pool,
    city_list,
    dated_block,
    is_missing,
    trip_file,
)

DAY = date(2024, 5, 1)
DELAY = re.compile(r"PT[0-9]+S|PT[0-9]+H[0-9]+M|PT[0-9]+M[0-9]+S")


class WrittenTrip(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """The five fields of a record; decoding refuses a missing or a sixth one."""

    departure_time: str
    bus_type: str
    passengers: int
    delay: str
    accident: bool


# More than one cycle of blocks and a part of a block: every kind of seam is in this file.
SMALL = trip_file(UpstreamOptions(trips_per_city=(BLOCKS_IN_CYCLE + 3) * TRIPS_PER_BLOCK + 77), 3, DAY)
SMALL_BYTES = b"".join(SMALL.read())

offsets = st.integers(min_value=0, max_value=len(SMALL_BYTES))


def forget_everything_rendered() -> None:
    block_pool.cache_clear()
    dated_block.cache_clear()


def test_a_file_rendered_twice_has_the_same_bytes() -> None:
    """A file rendered again from nothing has the same bytes."""
    options = UpstreamOptions(seed=9, trips_per_city=3000)
    first = b"".join(trip_file(options, 4, DAY).read())
    forget_everything_rendered()
    assert b"".join(trip_file(options, 4, DAY).read()) == first


def test_bytes_and_etag_are_pinned() -> None:
    """The bytes and the ETag of version 1 never change; a change of the bytes needs another GENERATOR_VERSION."""
    file = trip_file(UpstreamOptions(trips_per_city=20_000), 3, DAY)
    digest = hashlib.sha256(b"".join(file.read())).hexdigest()
    assert digest == "5fb0b762b5be6af81f65eef7b3455f1fae2ffbce83c1db17fce463cea51aed85"
    assert file.etag == '"995b56b1c0edc0f71e88556280f35355"'


def test_seed_city_and_date_change_the_file() -> None:
    """Another seed, city or date is another file, with another ETag."""
    files = [
        trip_file(UpstreamOptions(seed=seed, trips_per_city=10), city_id, day)
        for seed in (1, 2)
        for city_id in (1, 2)
        for day in (DAY, DAY + timedelta(days=1))
    ]
    assert len({b"".join(file.read()) for file in files}) == len(files)
    assert len({file.etag for file in files}) == len(files)


def test_etag_depends_on_the_bytes_alone() -> None:
    """An option that changes no byte of a file changes no ETag, and a trip more changes it."""
    plain = UpstreamOptions(trips_per_city=10)
    same = UpstreamOptions(trips_per_city=10, cities=99, countries=7, missing_days=1, ranges=False)
    more = UpstreamOptions(trips_per_city=11)
    assert trip_file(plain, 3, DAY).etag == trip_file(same, 3, DAY).etag
    assert trip_file(plain, 3, DAY).etag != trip_file(more, 3, DAY).etag


@given(offsets, offsets)
def test_any_range_is_a_slice_of_the_file(one: int, other: int) -> None:
    """Reading from start to stop gives that slice of the whole file, in chunks that are not empty."""
    start, stop = sorted((one, other))
    chunks = list(SMALL.read(start, stop))
    assert b"".join(chunks) == SMALL_BYTES[start:stop]
    assert all(chunks)


@given(st.lists(offsets, max_size=8))
def test_ranges_side_by_side_make_the_file(cuts: list[int]) -> None:
    """Ranges that touch each other concatenate to the whole file, wherever the cuts are."""
    edges = [0, *sorted(cuts), SMALL.size_bytes]
    assert b"".join(chunk for start, stop in pairwise(edges) for chunk in SMALL.read(start, stop)) == SMALL_BYTES


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, len(SMALL_BYTES) + 1)])
def test_a_range_outside_the_file_is_an_error(start: int, stop: int) -> None:
    """A range that is reversed or reaches outside the file is refused, not clipped."""
    with pytest.raises(ValueError, match="not inside a file"):
        next(SMALL.read(start, stop))


@pytest.mark.parametrize(
    "trips",
    [
        0,
        1,
        2,
        TRIPS_PER_BLOCK - 1,
        TRIPS_PER_BLOCK,
        TRIPS_PER_BLOCK + 1,
        TRIPS_PER_BLOCK * BLOCKS_IN_CYCLE,
        TRIPS_PER_BLOCK * BLOCKS_IN_CYCLE + 1,
    ],
)
def test_trip_count_and_size_are_exact(trips: int) -> None:
    """A file is a JSON array of exactly the trips asked for, and as long as it says."""
    file = trip_file(UpstreamOptions(trips_per_city=trips), 1, DAY)
    body = b"".join(file.read())
    assert len(msgspec.json.decode(body, type=list[WrittenTrip])) == trips == file.trips
    assert len(body) == file.size_bytes


def test_every_record_is_a_plausible_trip() -> None:
    """Every record has exactly the five fields, each in its range, and the rare writings do occur."""
    trips = msgspec.json.decode(SMALL_BYTES, type=list[WrittenTrip])
    assert len(trips) == SMALL.trips
    for trip in trips:
        assert re.fullmatch(r"2024-05-01T([01][0-9]|2[0-3]):[0-5][0-9]:00", trip.departure_time)
        assert re.fullmatch(r"BUS-1[0-4][0-9]", trip.bus_type)
        assert 0 <= trip.passengers <= 120
        assert DELAY.fullmatch(trip.delay)
    writings = Counter(re.sub(r"[0-9]+", "n", trip.delay) for trip in trips)
    assert writings.keys() == {"PTnS", "PTnHnM", "PTnMnS"}
    assert writings["PTnS"] > len(trips) / 2
    assert 0 < sum(trip.accident for trip in trips) < len(trips) / 100


def test_the_json_is_compact_and_in_the_upstream_order() -> None:
    """A record is written without spaces, its fields in the order the upstream's clients know."""
    record = SMALL_BYTES[1 : SMALL_BYTES.index(b"}") + 1]
    assert re.fullmatch(
        rb'\{"departure-time":"[^"]+","bus-type":"[^"]+","passengers":[0-9]+,"delay":"[^"]+",'
        rb'"accident":(true|false)\}',
        record,
    )


def test_chunks_have_64_to_256_kib() -> None:
    """Every chunk of a whole file but the last is between 64 and 256 KiB."""
    lengths = [len(chunk) for chunk in SMALL.read()]
    assert all(64 * 1024 <= length <= 256 * 1024 for length in lengths[:-1])
    assert lengths[-1] <= 256 * 1024


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_default_files_have_their_documented_sizes(seed: int) -> None:
    """By default a date is about 220 MB: one file above 100 MB and 29 of 1 to 20 MB, known without rendering."""
    options = UpstreamOptions(seed=seed)
    dated_block.cache_clear()
    for day in (DAY, date(2020, 2, 29), date(2031, 12, 31)):
        big, *towns = (trip_file(options, city_id, day).size_bytes for city_id in range(30))
        assert 104_000_000 < big < 110_000_000
        assert all(1_000_000 <= town <= 20_000_000 for town in towns)
        assert 200_000_000 < big + sum(towns) < 250_000_000
    assert dated_block.cache_info().misses == 0


def test_the_end_of_a_huge_file_is_rendered_alone() -> None:
    """The last kilobyte of a file above 4 GB takes the rendering of no more than its last blocks."""
    file = trip_file(UpstreamOptions(trips_per_city=40_000_000), 1, DAY)
    assert file.size_bytes > 4 * 1024**3
    dated_block.cache_clear()
    tail = b"".join(file.read(file.size_bytes - 1024))
    assert len(tail) == 1024
    assert tail.endswith(b"}]")
    assert dated_block.cache_info().misses <= 2


def test_streaming_holds_a_few_blocks() -> None:
    """Reading a 100 MB file takes a few MB of memory: the blocks that it repeats."""
    file = trip_file(UpstreamOptions(), 0, DAY)
    dated_block.cache_clear()
    tracemalloc.start()
    try:
        total_bytes = sum(len(chunk) for chunk in file.read())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total_bytes == file.size_bytes > 100_000_000
    assert peak_bytes < 4_000_000


@pytest.mark.parametrize("missing_days", [0, 1, 7, 100])
def test_a_city_misses_the_chosen_number_of_any_100_days(missing_days: int) -> None:
    """Exactly the chosen number of any 100 consecutive dates of a city have no file."""
    options = UpstreamOptions(missing_days=missing_days)
    for first in (DAY, DAY + timedelta(days=33), date(1999, 12, 31)):
        days = [first + timedelta(days=step) for step in range(100)]
        assert sum(is_missing(options, 5, day) for day in days) == missing_days


def test_missing_days_differ_by_city_and_grow() -> None:
    """Cities miss different days, and a city that misses more days misses the same ones too."""

    def missing(city_id: int, missing_days: int) -> set[int]:
        options = UpstreamOptions(missing_days=missing_days)
        return {step for step in range(100) if is_missing(options, city_id, DAY + timedelta(days=step))}

    assert missing(1, 10) != missing(2, 10)
    assert missing(1, 10) < missing(1, 20)


def test_a_missing_day_has_no_file() -> None:
    """Asking for the file of a missing day says which city and date it is."""
    with pytest.raises(NoTripFileError, match="city 2 has no file for 2024-05-01"):
        trip_file(UpstreamOptions(missing_days=100), 2, DAY)


@pytest.mark.parametrize("city_id", [-1, 30])
def test_an_unknown_city_has_no_file(city_id: int) -> None:
    """A city that is not in the list has no file."""
    with pytest.raises(NoTripFileError, match=f"no city {city_id}"):
        trip_file(UpstreamOptions(), city_id, DAY)


def test_the_default_list_has_thirty_cities() -> None:
    """Thirty cities lie six to a country; some names are not ASCII, and one country has two cities of one name."""
    cities = city_list(UpstreamOptions())
    assert [city.id for city in cities] == list(range(30))
    assert sorted(Counter(city.country for city in cities).values()) == [6] * 5
    assert any(not city.country.isascii() for city in cities)
    assert max(Counter((city.name, city.country) for city in cities).values()) == 2


def test_long_city_lists_continue_with_numbers() -> None:
    """Lists longer than the names go on with numbers, keep the cities before, and never merge two countries."""
    options = UpstreamOptions(cities=len(CITY_NAMES) * 3, countries=len(COUNTRY_NAMES) * 2 + 1)
    cities = city_list(options)
    assert len({city.country for city in cities}) == options.countries
    assert cities[len(CITY_NAMES)].name == "Port Tina 2"
    assert [city.name for city in cities[:30]] == [city.name for city in city_list(UpstreamOptions())]


@pytest.mark.parametrize(
    "fields",
    [{"cities": -1}, {"countries": 0}, {"trips_per_city": -1}, {"missing_days": -1}, {"missing_days": 101}],
)
def test_options_out_of_range_are_refused(fields: dict[str, int]) -> None:
    """An option out of its range is refused, by name."""
    with pytest.raises(ValueError, match=next(iter(fields))):
        msgspec.convert(fields, UpstreamOptions)
