"""The examples for downstream teams, each run as its user runs it, against one Tripfold: they agree with the API.

The bucket and the topics hold data that a naive consumer gets wrong. There is a corrected file, a city that moved to
another country, and an upload of a crashed worker. There are repeated records, records that are no events, a byte order
mark, repeated fields, and names that keys have to escape.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import runpy
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from services.aggregate.tables.builder import TableBuilder
from shared.domain import keys
from shared.domain.ids import utc_now
from shared.domain.objects import Manifest
from shared.domain.topics import partition_of
from shared.kafka.group_offsets import read_group_offsets
from shared.runtime.settings import Settings
from shared.storage.repository import Repository
from tests import ROOT
from tests.integration.conftest import isolated_settings
from tests.integration.running import Running, environment_of, eventually, running
from tests.integration.trips import make_trips
from tests.integration.upstream import UpstreamServer
from tripfold.local.embedded import EmbeddedServices

in_one_loop = pytest.mark.asyncio(loop_scope="module")

EXAMPLES = ROOT / "examples"
DATES = ("2024-05-01", "2024-05-02")
RUN_DEADLINE_S = 60

Figures = dict[tuple[str, str], tuple[int, int]]
"""Trips and passengers by country and date."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tripfold(embedded: EmbeddedServices, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Run Tripfold with two dates processed, one of them twice: a file was corrected, and a city had moved."""
    with UpstreamServer() as upstream:
        settings = isolated_settings(embedded, UPSTREAM_URL=upstream.url, TABLES_INTERVAL_S="0.5")
        async with running(settings, tmp_path_factory.mktemp("logs")) as services:
            upstream.add_city(0, "Port Tina", "Armenia")
            upstream.add_city(1, "Nowhere", "Armenia")
            upstream.add_city("san/josé", "San José", "Россия")
            upstream.add_city(3, "Lima", "Peru")
            for seed, date in enumerate(DATES):
                for city in (0, "san/josé", 3):
                    upstream.put(city, date, make_trips(seed + 10 * len(str(city)), 150, date))
                upstream.put(1, date, [])
            odd = json.dumps(make_trips(7, 40, DATES[0])).replace("{", '{"passengers": 999999, ')
            upstream.files["san/josé", DATES[0]] = b"\xef\xbb\xbf" + odd.encode()
            for date in DATES:
                assert (await services.process(date))["status"] == "completed"
            upstream.put(0, DATES[0], make_trips(99, 80, DATES[0]))
            upstream.add_city(3, "Lima", "Portugal")
            assert (await services.process(DATES[0]))["status"] == "completed"
            await services.store.put(
                f"raw/date={DATES[0]}/city=0/{'f' * 32}.json", json.dumps(make_trips(5, 7, DATES[0])).encode()
            )
            await repeat_first_record(settings, "city-stats")
            for topic in ("city-stats", "country-day-summaries"):
                await publish_what_is_no_event(settings, topic)
            # The aggregate publishes the current event of a repeated one again: not while an example reads.
            await eventually(lambda: _all_is_consumed(settings), "the aggregate to have read all records")
            yield services


async def _all_is_consumed(settings: Settings) -> bool | None:
    return None if any(one.lag for one in await read_group_offsets(settings)) else True


async def publish_what_is_no_event(settings: Settings, topic: str) -> None:
    """Publish records that are no JSON objects, and a tombstone, to every partition."""
    name = settings.topic_prefix + topic
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers) as producer:
        for partition in await producer.partitions_for(name):
            for value in (b"[1]", b'"text"', b"7", b"null", b"{", b"\xff", b"", b"{}", None):
                await producer.send_and_wait(name, value, key=b"2024-05-01/nowhere", partition=partition)


async def repeat_first_record(settings: Settings, topic: str) -> None:
    """Publish the oldest record of each partition again, as a paused process that comes back would."""
    name = settings.topic_prefix + topic
    servers = settings.kafka_bootstrap_servers
    async with (
        AIOKafkaConsumer(name, bootstrap_servers=servers, group_id=None, auto_offset_reset="earliest") as consumer,
        AIOKafkaProducer(bootstrap_servers=servers, partitioner=partition_of) as producer,
    ):
        ends = await consumer.end_offsets(consumer.assignment())
        for partition in [partition for partition, end in ends.items() if end]:
            record = await consumer.getone(partition)
            await producer.send_and_wait(name, record.value, record.key, headers=list(record.headers))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tripfold: Running) -> Figures:
    """Return what the API says."""
    statistics = await tripfold.stats(*DATES)
    figures = {
        (country, date): (day["bus_count"], day["passenger_count"])
        for country, days in statistics.items()
        for date, day in days.items()
        if day["bus_count"]
    }
    assert {("portugal", DATES[0]), ("peru", DATES[1])} <= figures.keys()
    assert ("peru", DATES[0]) not in figures
    return figures


async def run(tripfold: Running, example: str, *arguments: str) -> tuple[list[str], str]:
    """Run an example with the environment of the stack; return the lines it printed, and what went to stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / example),
        *arguments,
        env={**environment_of(tripfold.settings), "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), RUN_DEADLINE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out.decode().splitlines(), err.decode()


def figures_of_summaries(lines: Iterable[str]) -> Figures:
    """Return the figures of printed summaries, of each country-day the last; those without trips left out."""
    last = {(one["country"], one["date"]): one["totals"] for one in map(json.loads, lines)}
    return {key: (totals["trips"], totals["passengers"]) for key, totals in last.items() if totals["trips"]}


def figures_of_rows(rows: Iterable[dict[str, Any]]) -> Figures:
    """Return the figures of rows with a country, a date, trips and passengers; those without trips left out."""
    return {(row["country"], row["date"]): (row["trips"], row["passengers"]) for row in rows if row["trips"]}


@in_one_loop
async def test_the_faststream_example_ends_with_the_served_numbers(tripfold: Running, served: Figures) -> None:
    """The FastStream consumer ends up with what the API serves."""
    lines, _ = await run(tripfold, "summaries_faststream.py", "--idle-s", "4")
    assert figures_of_summaries(lines) == served


@in_one_loop
async def test_the_aiokafka_example_adds_up_to_the_served_numbers(tripfold: Running, served: Figures) -> None:
    """Adding the cities up, with aiokafka, gives what the API serves."""
    lines, _ = await run(tripfold, "city_stats_aiokafka.py")
    assert figures_of_rows(map(json.loads, lines)) == served


@in_one_loop
async def test_the_confluent_example_prints_each_country_day_once(tripfold: Running, served: Figures) -> None:
    """The confluent-kafka consumer prints each country-day once, as the API serves it."""
    lines, _ = await run(tripfold, "summaries_confluent.py")
    assert figures_of_summaries(lines) == served
    assert len(lines) == len(served) + 1  # and the country that its only city left


@in_one_loop
async def test_the_duckdb_example_reads_the_served_numbers(tripfold: Running, served: Figures) -> None:
    """DuckDB reads from S3 the same statistics of the requested dates as the API serves."""
    lines, _ = await run(tripfold, "summaries_duckdb.py", "--from", DATES[1], "--to", "2024-05-31")
    assert figures_of_rows(map(json.loads, lines)) == {key: one for key, one in served.items() if key[1] == DATES[1]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tables(tripfold: Running) -> TableBuilder:
    """Wait until the aggregate has built the tables from all summaries."""
    builder = TableBuilder(tripfold.store, clock=utc_now)

    async def current() -> TableBuilder | None:
        return None if await builder.changed_months(1) or not await builder.months(1) else builder

    return await eventually(current, "the tables")


@in_one_loop
@pytest.mark.usefixtures("tables")
async def test_the_tables_show_the_served_numbers_in_sql(tripfold: Running, served: Figures) -> None:
    """DuckDB reads both tables, and the sums over the cities are those of their countries."""
    lines, _ = await run(tripfold, "tables_duckdb.py")
    assert figures_of_rows(map(json.loads, lines)) == served
    sums = "select country, date, sum(trips) trips, sum(passengers) passengers from city_days group by all"
    lines, _ = await run(tripfold, "tables_duckdb.py", sums)
    assert figures_of_rows(map(json.loads, lines)) == served


@in_one_loop
@pytest.mark.usefixtures("tables")
async def test_the_pandas_example_adds_up_to_the_served_numbers(tripfold: Running, served: Figures) -> None:
    """The sums of a range of dates by country, with the average of the exact sums."""
    lines, _ = await run(tripfold, "tables_pandas.py", "--from", DATES[1], "--to", "2024-06-30")
    rows = [{**json.loads(line), "date": DATES[1]} for line in lines]
    assert figures_of_rows(rows) == {key: one for key, one in served.items() if key[1] == DATES[1]}
    assert all(abs(row["average_delay_s"] - row["delay_total_ms"] / row["trips"] / 1000) < 1e-6 for row in rows)


@in_one_loop
@pytest.mark.usefixtures("tables")
async def test_the_polars_example_has_each_city_and_its_file(tripfold: Running, served: Figures) -> None:
    """The cities add up to their countries; each names the SHA-256 of its manifest."""
    lines, _ = await run(tripfold, "tables_polars.py", "--from", DATES[0], "--to", DATES[0])
    sums: Figures = {}
    for row in map(json.loads, lines):
        before = sums.get((row["country"], row["date"]), (0, 0))
        sums[row["country"], row["date"]] = (before[0] + row["trips"], before[1] + row["passengers"])
        key = keys.manifest(dt.date.fromisoformat(row["date"]), row["city_id"])
        manifest = await Repository(tripfold.store).get(Manifest, key)
        assert manifest is not None
        assert row["sha256"] == manifest.sha256
    assert {key: one for key, one in sums.items() if one[0]} == {
        key: one for key, one in served.items() if key[1] == DATES[0]
    }


@in_one_loop
async def test_the_raw_trips_example_adds_up_to_the_served_numbers(tripfold: Running, served: Figures) -> None:
    """Raw trips joined through the manifests are what the API serves; a bare glob would have counted more."""
    lines, told = await run(tripfold, "raw_trips_duckdb.py", "--date", DATES[0])
    figures = figures_of_rows({**json.loads(line), "date": DATES[0]} for line in lines)
    assert figures == {key: one for key, one in served.items() if key[1] == DATES[0]}
    # The file before it was corrected, and what the crashed worker left.
    assert told.strip() == "4 files by the manifests; a bare glob over raw/ would have read 6"


@in_one_loop
async def test_the_table_example_continues_and_can_be_reset(tripfold: Running, served: Figures, tmp_path: Path) -> None:
    """A table of one's own is what the API serves; run again it goes on, and set back it is the same again."""
    path = tmp_path / "city_days.sqlite"
    arguments = ("rebuild_table.py", "--database", str(path))
    await run(tripfold, *arguments)
    assert _table(path) == served
    [again], _ = await run(tripfold, *arguments)
    assert again == "0 records read"
    with sqlite3.connect(path) as database:
        database.execute("delete from city_days where country = 'portugal'")
        database.execute("update offsets set next = case partition when 0 then 10000000 else 0 end")
    await run(tripfold, *arguments)
    assert _table(path) == served


@in_one_loop
async def test_the_notebook_reads_the_served_numbers(
    tripfold: Running, served: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code cells of the notebook, run in their order, end with a table of what the API serves."""
    monkeypatch.setenv("TRIPFOLD_API_URL", str(tripfold.client.base_url))
    cells = json.loads((EXAMPLES / "analysis.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}

    def run_cells() -> None:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)

    await asyncio.to_thread(run_cells)
    rows = names["table"].fillna({"bus_count": 0}).itertuples()
    assert {
        (row.country, f"{row.date:%Y-%m-%d}"): (row.bus_count, row.passenger_count) for row in rows if row.bus_count
    } == served
    assert names["job"].status == "completed"
    assert names["sums"]["bus_count"].sum() == sum(trips for trips, _ in served.values())


def _table(path: Path) -> Figures:
    with sqlite3.connect(path) as database:
        database.row_factory = sqlite3.Row
        return figures_of_rows(map(dict, database.execute("select * from country_days")))


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_each_example_has_a_help_text(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each example says how to run it, and is in the README of the examples."""
    monkeypatch.setattr(sys, "argv", [example, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    assert f"python examples/{example}" in capsys.readouterr().out
    assert f"[{example}]({example})" in (EXAMPLES / "README.md").read_text()
