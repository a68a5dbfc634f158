"""Generates trip files from a seed: files of any size, and any byte range of them.

A seed has a pool of blocks of trips. A file is a JSON array that repeats a few of these blocks until it has the right
number of trips. So a file's size is known without its content, a byte range costs only its own blocks, and a file of
4 GB needs no more memory than one of 4 MB.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from random import Random

import msgspec

GENERATOR_VERSION = 1
"""A part of every ETag. Increase it with each change that changes the bytes of a file."""

TRIPS_PER_BLOCK = 1024
BLOCKS_IN_POOL = 64
BLOCKS_IN_CYCLE = 16
MEAN_TRIP_BYTES = 112

BIG_CITY_ID = 0
DAYS_IN_PATTERN = 100
# Its multiples modulo 1 lie evenly in 0..1, however many there are.
GOLDEN_RATIO = 0.618033988749895

DATE_PLACEHOLDER = b"0000-00-00"

# Only append: the position of a name identifies its country or city.
COUNTRY_NAMES = (
    "Armenia",
    "Côte d'Ivoire",
    "Portugal",
    "Japan",
    "Peru",
    "Türkiye",
    "Kenya",
    "Norway",
    "Vietnam",
    "Uruguay",
    "Czechia",
    "São Tomé and Príncipe",
    "New Zealand",
    "Ísland",
    "Morocco",
    "Ελλάδα",
    "Chile",
    "ไทย",
    "Botswana",
    "Україна",
)
# Two cities are named São Miguel. Both are in the same one of the default five countries.
CITY_NAMES = (
    "Port Tina",
    "Grand-Béréby",
    "São Miguel",
    "Hoshikawa",
    "Villa Rosario",
    "East Karen",
    "Abengourou",
    "São Miguel",
    "Minamida",
    "Santa Lucía",
    "Lake Anahit",
    "Port-Bouët",
    "Vila Nova",
    "Kitamori",
    "Puerto Alto",
    "New Gyumri",
    "Sassandra",
    "São Bento",
    "Umegaoka",
    "Los Olivos",
    "North Sevan",
    "Bondoukou",
    "Ribeira Velha",
    "Aoyagi",
    "Cerro Blanco",
    "Vardavan",
    "Yamoussou",
    "Monte Claro",
    "Shirahama",
    "Tres Ríos",
)


class NoTripFileError(LookupError):
    """The city has no file on this date, or does not exist."""


class UpstreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of the reference upstream: its files and its HTTP features.

    If ``trips_per_city`` is None, city 0 has more than 100 MB, and the others 1 to 20 MB: about 220 MB a date with 30
    cities. A city lacks ``missing_days`` of any 100 consecutive dates. Some real servers lack conditional requests
    (``etag``) and byte ranges (``ranges``). Raises ValueError on a value out of range.
    """

    seed: int = 1
    cities: int = 30
    countries: int = 5
    trips_per_city: int | None = None
    missing_days: int = 0
    etag: bool = True
    ranges: bool = True

    def __post_init__(self) -> None:
        if self.cities < 0:
            raise ValueError(f"cities must be 0 or more, not {self.cities}")
        if self.countries < 1:
            raise ValueError(f"countries must be 1 or more, not {self.countries}")
        if self.trips_per_city is not None and self.trips_per_city < 0:
            raise ValueError(f"trips_per_city must be 0 or more, not {self.trips_per_city}")
        if not 0 <= self.missing_days <= DAYS_IN_PATTERN:
            raise ValueError(f"missing_days must be 0 to {DAYS_IN_PATTERN}, not {self.missing_days}")


class City(msgspec.Struct, frozen=True):
    """One entry of ``GET /cities``."""

    id: int
    name: str
    country: str


class TripBlock(msgspec.Struct, frozen=True, eq=False):
    """``TRIPS_PER_BLOCK`` trips as JSON, each with a comma after it and a placeholder for the date.

    ``ends[i]`` is the offset after the comma of trip ``i``. The placeholder has the length of a date, so the offsets
    are right for every date. A block is equal only to itself, which makes it a cheap cache key.
    """

    template: bytes
    ends: tuple[int, ...]


class TripFile(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """The file of a city-day. Its bytes are generated when they are read.

    ``etag`` is a strong entity tag with its quotes. It depends on everything that the bytes depend on, and on nothing
    else. The file repeats the blocks of ``cycle``; its last block is cut so that the file has ``trips`` trips.
    ``cycle_ends[i]`` is the offset after block ``i``, without the opening bracket.
    """

    date: date
    trips: int
    etag: str
    cycle: tuple[TripBlock, ...]
    cycle_ends: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """The length of the file."""
        return len(b"[") + self._offset_of_block(self._last_block) + self._last_block_bytes + len(b"]")

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to ``stop`` (default: the end) in chunks of a block, about 115 KB.

        Raises ValueError, before the first chunk, if the range is not inside the file.
        """
        stop = self.size_bytes if stop is None else stop
        if not 0 <= start <= stop <= self.size_bytes:
            raise ValueError(f"bytes {start} to {stop} are not inside a file of {self.size_bytes} bytes")
        if start == stop:
            return
        number = self._block_at(start)
        offset = self._offset_of_block(number) + (len(b"[") if number else 0)
        while offset < stop:
            piece = self._piece(number)
            # A slice of all bytes is the same object, so whole blocks are not copied.
            yield piece[max(start - offset, 0) : stop - offset]
            offset += len(piece)
            number += 1

    @property
    def _last_block(self) -> int:
        return max(self.trips - 1, 0) // TRIPS_PER_BLOCK

    @property
    def _last_block_bytes(self) -> int:
        trips = self.trips - self._last_block * TRIPS_PER_BLOCK
        block = self.cycle[self._last_block % len(self.cycle)]
        return block.ends[trips - 1] - len(b",") if trips else 0

    def _piece(self, number: int) -> bytes:
        piece = dated_block(self.cycle[number % len(self.cycle)], self.date.isoformat())
        if number == self._last_block:
            piece = piece[: self._last_block_bytes] + b"]"
        return piece if number else b"[" + piece

    def _offset_of_block(self, number: int) -> int:
        cycles, place = divmod(number, len(self.cycle))
        return cycles * self.cycle_ends[-1] + (self.cycle_ends[place - 1] if place else 0)

    def _block_at(self, offset: int) -> int:
        cycles, rest = divmod(max(offset - len(b"["), 0), self.cycle_ends[-1])
        return min(cycles * len(self.cycle) + bisect_right(self.cycle_ends, rest), self._last_block)


def city_list(options: UpstreamOptions) -> list[City]:
    """Return the cities by ascending id, distributed evenly over the countries.

    They are the same for every seed, so another seed has corrected files of the same cities.
    """
    return [
        City(
            id=city_id,
            name=_name(CITY_NAMES, city_id),
            country=_name(COUNTRY_NAMES, city_id % options.countries),
        )
        for city_id in range(options.cities)
    ]


def trip_file(options: UpstreamOptions, city_id: int, day: date) -> TripFile:
    """Describe the file of a city-day without rendering it.

    Raises NoTripFileError if the city is unknown, or has no file on this date.
    """
    if not 0 <= city_id < options.cities:
        raise NoTripFileError(f"there is no city {city_id}")
    if is_missing(options, city_id, day):
        raise NoTripFileError(f"city {city_id} has no file for {day}")
    trips = _trip_count(options, city_id, day)
    cycle = _cycle(options.seed, city_id, day)
    return TripFile(
        date=day,
        trips=trips,
        etag=f'"{_digest("file", options.seed, city_id, day, trips).hex()}"',
        cycle=cycle,
        cycle_ends=tuple(accumulate(len(block.template) for block in cycle)),
    )


def is_missing(options: UpstreamOptions, city_id: int, day: date) -> bool:
    """Return whether the city has no file on this date.

    The missing days repeat every 100 days, so any 100 consecutive dates lack exactly ``missing_days`` files. A greater
    number adds missing days to those of a smaller one.
    """
    if options.missing_days == 0:
        return False
    order = sorted(range(DAYS_IN_PATTERN), key=lambda place: _digest("missing", options.seed, city_id, place))
    return day.toordinal() % DAYS_IN_PATTERN in order[: options.missing_days]


@lru_cache(maxsize=4)
def block_pool(seed: int) -> tuple[TripBlock, ...]:
    """Render all blocks of a seed: about 7 MB."""
    return tuple(_block(seed, number) for number in range(BLOCKS_IN_POOL))


@lru_cache(maxsize=256)
def dated_block(block: TripBlock, date_text: str) -> bytes:
    """Render a block for a date. The cache holds the last 256 of them, about 30 MB."""
    return block.template.replace(DATE_PLACEHOLDER, date_text.encode())


def _block(seed: int, number: int) -> TripBlock:
    # Python promises the same numbers in every version only for random().
    draw = Random(_digest("block", seed, number)).random  # noqa: S311  # no secret; it must repeat
    # Blocks in the middle of the pool are rush hours, with fuller buses and longer delays.
    rush = BLOCKS_IN_POOL // 2 - abs(number - BLOCKS_IN_POOL // 2)
    trips = [_trip(draw, rush) for _ in range(TRIPS_PER_BLOCK)]
    return TripBlock(template=b"".join(trips), ends=tuple(accumulate(map(len, trips))))


def _trip(draw: Callable[[], float], rush: int) -> bytes:
    hour, minute = divmod(int(draw() * 24 * 60), 60)
    bus = 100 + int(draw() * 50)
    passengers = int(draw() * (57 + 2 * rush))
    lateness = draw()
    delay = _duration(int(lateness * lateness * lateness * (900 + 200 * rush)), writing=int(draw() * 8))
    accident = "true" if draw() * 500 < 1 else "false"
    return (
        f'{{"departure-time":"{DATE_PLACEHOLDER.decode()}T{hour:02}:{minute:02}:00","bus-type":"BUS-{bus}",'
        f'"passengers":{passengers},"delay":"{delay}","accident":{accident}}},'
    ).encode()


def _duration(duration_s: int, *, writing: int) -> str:
    """Return a duration as ``PT4080S``, or for ``writing`` 0 as ``PT1H8M`` and for 1 as ``PT12M30S``.

    ``PT1H8M`` drops the seconds. A duration that is too short for a unit is written without it.
    """
    minutes, seconds = divmod(duration_s, 60)
    if writing == 0 and minutes >= 60:
        return f"PT{minutes // 60}H{minutes % 60}M"
    if writing == 1 and minutes:
        return f"PT{minutes}M{seconds}S"
    return f"PT{duration_s}S"


def _cycle(seed: int, city_id: int, day: date) -> tuple[TripBlock, ...]:
    """Return neighbouring blocks of the pool in random order, so that some days are busy and others calm."""
    pool = block_pool(seed)
    first = int(_fraction("mood", seed, city_id, day) * len(pool))
    neighbours = [(first + step) % len(pool) for step in range(BLOCKS_IN_CYCLE)]
    neighbours.sort(key=lambda number: _digest("order", seed, city_id, day, number))
    return tuple(pool[number] for number in neighbours)


def _trip_count(options: UpstreamOptions, city_id: int, day: date) -> int:
    if options.trips_per_city is not None:
        return options.trips_per_city
    today = _fraction("size", options.seed, city_id, day)
    if city_id == BIG_CITY_ID:
        return int(106_000_000 + 3_000_000 * today) // MEAN_TRIP_BYTES
    # Most towns are small: the fifth power puts half of them below 2 MB. Their size varies by a tenth.
    town = (_fraction("town", options.seed) + city_id * GOLDEN_RATIO) % 1
    usual_bytes = 1_200_000 + 16_500_000 * town * town * town * town * town
    return int(usual_bytes * (0.9 + 0.2 * today)) // MEAN_TRIP_BYTES


def _name(names: Sequence[str], place: int) -> str:
    """Return the name of a place, with a number (``Port Tina 2``) once all names are used."""
    lap, index = divmod(place, len(names))
    return f"{names[index]} {lap + 1}" if lap else names[index]


def _fraction(*key: object) -> float:
    """Return a number from 0 up to 1 that depends only on the key."""
    return int.from_bytes(_digest(*key)[:6]) / 2**48


def _digest(*key: object) -> bytes:
    """Return the hash of a key and of the generator's version. No part of a key may contain a slash."""
    return blake2b("/".join(map(str, (GENERATOR_VERSION, *key))).encode(), digest_size=16).digest()
