"""Heads from the Parquet tables equal those of the summaries, and count only under the same version."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from services.aggregate.tables.builder import TableBuilder
from services.api.http.date_range import DateRange
from services.api.statistics import table_heads
from services.api.statistics.reader import SummaryReader
from services.api.statistics.table_heads import heads_of
from shared.domain import keys, objects
from shared.domain.contribution import Totals
from shared.domain.ids import EXACT_MAX, CountrySlug
from shared.domain.objects import GenerationPointer, Summary
from shared.domain.tables import COUNTRY_DAYS, country_row
from shared.runtime.parquet import TableWriter
from shared.storage.object_store import StoredObject, StoreUnavailable
from tests.fakes.api import DAY, NOW, ObservedStore, World, stats

MAY = DateRange(dt.date(2024, 5, 1), dt.date(2024, 5, 31))
COUNTRIES = [CountrySlug(slug) for slug in ("armenia", "belgium", "chad")]
counts = st.integers(0, EXACT_MAX)
signed = st.integers(-EXACT_MAX, EXACT_MAX)
summaries = st.builds(
    Summary,
    schema_version=st.just(1),
    date=st.dates(MAY.first, MAY.last),
    country=st.sampled_from(COUNTRIES),
    country_name=st.text(max_size=5),
    version=counts,
    totals=st.fixed_dictionaries(dict.fromkeys(Totals.__struct_fields__, counts) | {"delay_total_ms": signed}).map(
        lambda figures: Totals(**figures)
    ),
    has_data=st.booleans(),
    cities_reported=counts,
    cities_expected=counts,
    complete=st.booleans(),
    last_ingested_at=st.none() | st.datetimes(timezones=st.just(dt.UTC)),
    plan_revision=counts,
    cities_suspicious=st.just(UNSET) | counts,
    plans=st.just(()),
    ledger=st.just({}),
)


@settings(max_examples=30)
@given(st.lists(summaries, max_size=4, unique_by=lambda one: (one.date, one.country)))
def test_a_row_gives_the_head_that_the_summary_gives(some: list[Summary]) -> None:
    """Every field of every summary."""
    writer = TableWriter(COUNTRY_DAYS)
    expected, etags = {}, {}
    for number, summary in enumerate(sorted(some, key=lambda one: (one.date, one.country))):
        key = keys.summary(1, summary.date, summary.country)
        etags[key] = f"e{number}"
        writer.add([country_row(summary, (1, etags[key]), key)])
        expected[key] = objects.decode_head(objects.encode(summary), key)
    assert heads_of(writer.close({}), 1, etags) == expected


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Give three countries with tables, which are read for any number of heads."""
    monkeypatch.setattr(table_heads, "HEADS_MIN", 1)
    world = World()
    for number, country in enumerate(COUNTRIES, 1):
        world.fold_in(stats(country, trips=number))
    await TableBuilder(world.store, clock=lambda: NOW).once()
    world.store.reads.clear()
    return world


async def served(world: World) -> dict[str, int]:
    """Return the trips of each country from an API with an empty cache."""
    reading = await SummaryReader(world.store, cache_bytes=1 << 20).read(MAY)
    assert not reading.unreadable
    return {head.country: head.totals.trips for head in reading.heads or ()}


def read_summaries(world: World) -> list[str]:
    return [key for key in world.store.reads if key.startswith(keys.SUMMARIES)]


def key_of(country: str, generation: int = 1) -> str:
    return keys.summary(generation, DAY, CountrySlug(country))


async def test_a_cold_cache_reads_one_table_instead_of_all_summaries(world: World) -> None:
    """Then the cache has the heads: the next query reads neither."""
    reader = SummaryReader(world.store, cache_bytes=1 << 20)
    for _ in range(2):
        reading = await reader.read(MAY)
        assert {head.country: head.totals.trips for head in reading.heads or ()} == {
            "armenia": 1,
            "belgium": 2,
            "chad": 3,
        }
    assert [key for key in world.store.reads if key != keys.CURRENT] == [COUNTRY_DAYS.key("2024-05")]


async def test_a_summary_that_changed_after_the_table_is_read(world: World) -> None:
    """The row has another ETag than the listing. A new summary has no row."""
    world.fold_in(stats("chad", trips=30, revision=9))
    world.fold_in(stats("peru", trips=40))
    assert await served(world) == {"armenia": 1, "belgium": 2, "chad": 30, "peru": 40}
    assert read_summaries(world) == [key_of("chad"), key_of("peru")]


async def test_rows_of_another_generation_do_not_count(world: World) -> None:
    """Even if the summaries of both generations have the same bytes, and so the same ETags."""
    for country in COUNTRIES:
        world.store.write(key_of(country, 2), world.store.objects[key_of(country)].body)
    world.store.write(keys.CURRENT, objects.encode(GenerationPointer(live=2, highest=2)))
    assert await served(world) == {"armenia": 1, "belgium": 2, "chad": 3}
    assert read_summaries(world) == [key_of(country, 2) for country in COUNTRIES]


async def test_a_row_without_a_summary_is_not_served(world: World) -> None:
    """The listing decides which country-days there are."""
    await world.store.delete(key_of("chad"))
    assert await served(world) == {"armenia": 1, "belgium": 2}


@pytest.mark.parametrize("body", [None, b"", b"PAR1 no table"])
async def test_summaries_are_read_if_the_table_is_missing_or_damaged(world: World, body: bytes | None) -> None:
    """A query never fails because of a table."""
    if body is None:
        await world.store.delete(COUNTRY_DAYS.key("2024-05"))
    else:
        world.store.write(COUNTRY_DAYS.key("2024-05"), body)
    assert await served(world) == {"armenia": 1, "belgium": 2, "chad": 3}
    assert read_summaries(world) == [key_of(country) for country in COUNTRIES]


async def test_summaries_are_read_if_the_table_is_forbidden(world: World) -> None:
    """As after an upgrade, before the API got the right to read the tables."""

    class Forbidding(ObservedStore):
        async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
            if key.startswith(keys.LAKE):
                raise StoreUnavailable(f"S3 GetObject {key}: 403")
            return await super().get(key, first_bytes=first_bytes)

    forbidding = Forbidding()
    forbidding.objects = world.store.objects
    world.store = forbidding
    assert await served(world) == {"armenia": 1, "belgium": 2, "chad": 3}


async def test_few_heads_are_read_one_by_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a month has many heads that a small query does not need."""
    monkeypatch.setattr(table_heads, "HEADS_MIN", 4)
    assert await served(world) == {"armenia": 1, "belgium": 2, "chad": 3}
    assert COUNTRY_DAYS.key("2024-05") not in world.store.reads
