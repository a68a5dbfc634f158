"""A clock, trip files, city lists and schedules for tests."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping

import msgspec

from services.ingest.upstream.errors import PermanentUpstreamError
from shared.domain.contribution import FIGURE_MAX, Contribution
from shared.domain.events import CityDayStats
from shared.domain.ids import REVISION_MAX, CityId, CountrySlug
from shared.domain.objects import Schedule
from shared.domain.schedules import new_schedule
from tests.fakes.upstream import MemoryUpstream


class Clock:
    """A clock that moves only when a test sets it."""

    def __init__(self, now: dt.datetime) -> None:
        self.now = now

    def __call__(self) -> dt.datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += dt.timedelta(seconds=seconds)


def daily_schedule(now: dt.datetime, *, name: str = "daily", **fields: object) -> Schedule:
    """Return a schedule made at ``now``: at six each day in UTC, for the day before. ``fields`` replace some."""
    made = new_schedule(
        name,
        cron="0 6 * * *",
        timezone="UTC",
        date_offset=-1,
        recheck=0,
        max_parallel=2,
        complete_by=None,
        now=now,
    )
    return msgspec.structs.replace(made, **fields)


class Trip(msgspec.Struct, frozen=True, kw_only=True):
    """A trip of the upstream; ``delay_ms`` is written as an ISO 8601 duration."""

    passengers: int
    delay_ms: int
    accident: bool = False


def trip_file(trips: Iterable[Trip], date: dt.date) -> bytes:
    """Write a trip file of one date."""
    records = [
        {
            "departure-time": f"{date}T{minute // 60:02}:{minute % 60:02}:00",
            "bus-type": f"BUS-{minute}",
            "passengers": trip.passengers,
            "delay": f"PT{trip.delay_ms // 1000}.{trip.delay_ms % 1000:03}S",
            "accident": trip.accident,
        }
        for minute, trip in enumerate(trips)
    ]
    return json.dumps(records, separators=(",", ":")).encode()


class City(msgspec.Struct, frozen=True):
    """A city of the upstream's list. Its country is one word, so the slug is the lower-case name."""

    id: int
    country: str
    name: str = "Port Tina"


class UpstreamState(msgspec.Struct, frozen=True, kw_only=True):
    """The city list and files of the upstream for one date.

    A city without a file gets a 404 response, and a file of bytes is not valid. ``cities`` is None when the list cannot
    be fetched. The list has the ids of ``in_text`` as strings. It has the cities of ``twice`` once more at its end,
    with an id of the other type.
    """

    cities: tuple[City, ...] | None
    files: Mapping[int, tuple[Trip, ...] | bytes]
    in_text: frozenset[int] = frozenset()
    twice: frozenset[int] = frozenset()

    def write_into(self, upstream: MemoryUpstream, date: dt.date) -> None:
        """Make the fake upstream serve this state."""
        if self.cities is None:
            upstream.city_list = PermanentUpstreamError("http://upstream.test/cities answered 403")
        else:
            entries = [_entry(city, in_text=city.id in self.in_text) for city in self.cities]
            doubled = [city for city in self.cities if city.id in self.twice]
            entries += [_entry(city, in_text=city.id not in self.in_text) for city in doubled]
            upstream.city_list = json.dumps(entries).encode()
        upstream.files = {
            str(city_id): file if isinstance(file, bytes) else trip_file(file, date)
            for city_id, file in self.files.items()
        }


def _entry(city: City, *, in_text: bool) -> dict[str, object]:
    return {"id": str(city.id) if in_text else city.id, "name": city.name, "country": city.country}


STATS = CityDayStats(
    date=dt.date(2024, 5, 1),
    country=CountrySlug("armenia"),
    country_name="Armenia",
    city_id=CityId("~old%20port"),
    city_name='Port "Tina"/🇦🇲',
    revision=136_807_200,
    contribution=Contribution(trips=2, passengers=90, accidents=1, delay_total_ms=-4_080_000),
    trips_on_other_dates=1,
    raw_key="raw/date=2024-05-01/city=7/a.json",
    sha256="aa",
    size_bytes=200,
    rule_version=1,
    ingested_at=dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC),
)


def forged_stats(name: str, value: int) -> bytes:
    """Return a record of statistics in which a figure, or the revision, has another value."""
    body = msgspec.to_builtins(STATS)
    fields = body if name == "revision" else body["contribution"]
    fields[name] = value
    return msgspec.json.encode(body)


_FIGURES_BEYOND = (-FIGURE_MAX - 1, FIGURE_MAX + 1, 2**64, 10**400, 10**4_299)
FORGED_STATS = (
    *(forged_stats(name, value) for name in Contribution.__struct_fields__ for value in _FIGURES_BEYOND),
    *(forged_stats("revision", value) for value in (0, REVISION_MAX + 1, 2**63 - 1, 10**400)),
)
"""Records of statistics in which one number is beyond its bounds."""


def trip_record(delay: str = "PT1S", departure: str = "2024-05-01T01:00:00", **more: object) -> dict[str, object]:
    """Return a trip as a file has it. Its bus type has characters that a careless parser misreads."""
    return {
        "departure-time": departure,
        "bus-type": 'a "}], \\ 🚌',
        "passengers": 3,
        "delay": delay,
        "accident": True,
        **more,
    }
