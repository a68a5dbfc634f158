"""Measure how fast events become summaries, next to the same keyed fold in Quix Streams: `python -m bench.fold`.

A topic holds city-day events of 200 countries, 2,740 for each date: a million on 365 dates. They come date by date, as
ingest publishes them, and the cities of a date in any order. A higher revision, which may come first, corrects one city
of fifty. Kafka is Apache Kafka where Java is installed, else the embedded one. Each contender reads the whole topic in
a process of its own. It keeps for each country-day the highest revision of every city, and the totals over them:

* `rebuild`: `tripfold rebuild --from kafka`, timed while it reads the topic. Every summary is on S3 then.
* `aggregate`: the service's consumer and folder. It also publishes each summary, and commits each batch.
* `Quix Streams` (`bench.quix`): a StreamingDataFrame with state, as its documentation has it; the state of a
  country-day holds an entry for each city, and the totals. It ends in RocksDB and in a changelog topic.
* `Quix Streams, no changelog`: the same without that topic: the state is on this machine's disk alone.

The benchmark lists Tripfold's stored summaries, and reads those of some dates again; Quix adds up its changes. Sums
that differ from those of the events fail the benchmark. Then a country of many cities is folded: one changed city, and
a full day.

Tripfold writes to two stores. `a sink` (`bench.null_s3`) keeps summaries in memory, with compare-and-swap: it costs
little, as the RocksDB that Quix writes to does, so this is the pair that compares the two. `SeaweedFS`, the embedded
one, is what a laptop has: a conditional write takes a millisecond of the same two cores, which limits everyone.

Bias: Tripfold checks each field, encodes a whole ledger, and puts it over HTTP, signed; Quix writes to a local disk,
and decodes with msgspec, without types. Its events are keyed by country-day in the key's deserializer, which saves it
the repartitioning of `group_by`. The stores and Kafka take their time from the same cores. Peak memory is that of the
whole process (VmHWM); for `rebuild` the comparison with the live generation is in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import uvloop

from bench.context import ROOT, Store, cpu_s, end_in_order, null_store, peak_rss_bytes, seaweedfs
from bench.quix import NOTHING, Measured, Sums
from bench.tables import print_table
from services.aggregate.app import STATISTICS_BATCH_MAX, STATISTICS_LINGER_MS
from services.aggregate.bucket_reader import read_summaries
from services.aggregate.consumer import CityStatsConsumer, tune_collector
from services.aggregate.replay.rebuild import Rebuild
from services.aggregate.replay.topic_reader import KafkaTopicReader
from services.aggregate.summary_writer import SummaryWriter
from shared.domain import keys, objects
from shared.domain.contribution import Contribution
from shared.domain.events import CityDayStats
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Summary
from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.kafka.consumer import consume, make_broker
from shared.kafka.failed_keys import KeyResult
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from shared.runtime.settings import Settings, load_settings
from shared.storage.generation_pointer import provision_pointer, read_current
from shared.storage.s3 import S3Store
from tests.apache_kafka import apache_kafka, reason_unavailable

COUNTRIES: Final = 200
EVENTS_PER_DATE: Final = 2_740
CORRECTED_ONE_OF: Final = 50
FIRST_DATE: Final = dt.date(2024, 1, 1)
PARTITIONS: Final = 12
VERIFIED_DATES: Final = 10
FEWER: Final = 5
"""Memory is compared with that for so many times fewer events."""
CITIES: Final = (1_000, 10_000)
CHANGES: Final = 21


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The medians of one contender's turns at one topic; ``store`` is the S3 that it wrote to, if it did."""

    name: str
    store: str | None
    events: int
    runs: int
    wall_s: float
    cpu_s: float
    store_cpu_s: float
    events_per_s: float
    events_per_cpu_s: float
    peak_rss_mb: float


class Large(msgspec.Struct, frozen=True, kw_only=True):
    """The fold of a country of many cities; of one changed city, the median."""

    cities: int
    summary_bytes: int
    changed_cpu_s: float
    changed_wall_s: float
    day_cpu_s: float
    day_wall_s: float


def main() -> None:
    """Fill the topics, run every contender and print the tables."""
    parser = argparse.ArgumentParser(description="Measure how fast events are folded into summaries.")
    parser.add_argument("--events", type=int, help="default: 200,000, with --quick 20,000")
    parser.add_argument("--dates", type=int, help="how many they are spread over; default: one for each 2,740 events")
    parser.add_argument("--runs", type=int, default=1, help="turns of each contender; the median counts")
    parser.add_argument("--quick", action="store_true", help="fewer events")
    parser.add_argument("--only", action="append", choices=[*OURS, *PEERS], help="leave out the others")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--contender", choices=list(OURS), help=argparse.SUPPRESS)
    parser.add_argument("--cities", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(msgspec.json.encode(OURS[options.contender](options.events, options.dates)).decode())
        return
    if options.cities:
        print(msgspec.json.encode(asyncio.run(_fold_large(options.cities))).decode())
        return
    end_in_order()
    events = options.events or (20_000 if options.quick else 200_000)
    dates = options.dates or -(-events // EVENTS_PER_DATE)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        null_store() as sink,
        seaweedfs(Path(folder) / "embedded") as real,
        _kafka(Path(folder) / "kafka") as (broker, own),
    ):
        bench = _Bench({**os.environ, **real.environment, **own}, options.runs, options.only)
        bench.compare(max(1, events // FEWER), max(1, dates // FEWER), [(name, sink) for name in OURS])
        ours = [(name, store) for store in (sink, real) for name in OURS]
        bench.compare(events, dates, [*ours, *((name, None) for name in PEERS)])
        large = [bench.large(cities) for cities in CITIES]
    _print_comparison([result for result in bench.results if result.events == events], dates, broker)
    _print_memory(bench.results, events)
    _print_large(large)
    if options.json:
        found = {"kafka": broker, "dates": dates, "results": bench.results, "large": large}
        options.json.write_text(json.dumps(msgspec.to_builtins(found), indent=2) + "\n")


@contextlib.contextmanager
def _kafka(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Run Apache Kafka; yield what to call it, and the environment that leads to it."""
    if reason := reason_unavailable():
        print(f"the embedded broker takes the place of Apache Kafka: {reason}", file=sys.stderr)
        yield "the embedded broker", {}
        return
    with apache_kafka(folder) as kafka:
        yield "Apache Kafka", {"TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": kafka.address}


def made_up_events(events: int, dates: int, seed: int = 1) -> Iterator[CityDayStats]:
    """Make so many events, the same ones for the same seed."""
    dice = random.Random(seed)
    for day in range(dates):
        date = FIRST_DATE + dt.timedelta(days=day)
        of_date = events * (day + 1) // dates - events * day // dates
        corrected = of_date // CORRECTED_ONE_OF
        revisions = [(city, 0) for city in range(of_date - corrected)] + [(city, 1) for city in range(corrected)]
        dice.shuffle(revisions)
        for city, revision in revisions:
            yield _event(date, city % COUNTRIES, city, 138_000_000 + revision, dice)


def _event(date: dt.date, country: int, city: int, revision: int, dice: random.Random) -> CityDayStats:
    return CityDayStats(
        date=date,
        country=CountrySlug(f"country-{country}"),
        country_name=f"Country {country}",
        city_id=CityId(str(city)),
        city_name=f"City {city}",
        revision=revision,
        contribution=Contribution(
            trips=dice.randrange(100_000),
            passengers=dice.randrange(5_000_000),
            accidents=dice.randrange(1000),
            delay_total_ms=dice.randrange(100_000_000),
        ),
        trips_on_other_dates=0,
        raw_key=f"raw/date={date}/city={city}/{dice.randbytes(16).hex()}.json",
        sha256=dice.randbytes(32).hex(),
        size_bytes=dice.randrange(100_000_000),
        rule_version=1,
        ingested_at=dt.datetime.combine(date, dt.time(23), dt.UTC),
    )


def expected_of(events: int, dates: int) -> tuple[dict[dt.date, Sums], int]:
    """Return the sums of the events by date, without Tripfold's fold, and how many country-days they are of."""
    highest: dict[tuple[dt.date, str], CityDayStats] = {}
    for event in made_up_events(events, dates):
        known = highest.get((event.date, event.city_id))
        if known is None or known.revision < event.revision:
            highest[event.date, event.city_id] = event
    by_date: dict[dt.date, Sums] = {}
    for event in highest.values():
        by_date[event.date] = _added(by_date.get(event.date, NOTHING), event.contribution)
    return by_date, len({(event.date, event.country) for event in highest.values()})


def _added(sums: Sums, more: Contribution) -> Sums:
    trips, passengers, accidents, delay_total_ms = sums
    return (
        trips + more.trips,
        passengers + more.passengers,
        accidents + more.accidents,
        delay_total_ms + more.delay_total_ms,
    )


def fold_with_rebuild(_events: int, dates: int) -> Measured:
    """Fold the topic as `tripfold rebuild --from kafka` does."""
    tune_collector()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_fold_with_rebuild(load_settings(), dates))


async def _fold_with_rebuild(settings: Settings, dates: int) -> Measured:
    reading: list[tuple[float, float]] = []

    def report(step: str, *_: int) -> None:
        if step == "reading the topic":
            reading.append((time.perf_counter(), time.process_time()))

    replay = KafkaTopicReader(settings, Topic.CITY_STATS)
    async with S3Store(settings) as store, KafkaPublisher(settings, source="bench") as publisher:
        await store.create_bucket()
        rebuilt = await Rebuild(store, publisher, token="bench", report=report, reader=replay).run()
        await replay.close()
        assert rebuilt.flipped, rebuilt.refused
        peak = peak_rss_bytes()
        by_date, country_days = await _stored(store, dates)
    (wall_s, cpu), (wall_end_s, cpu_end) = reading[0], reading[-1]
    return Measured(
        wall_s=wall_end_s - wall_s,
        cpu_s=cpu_end - cpu,
        peak_rss_bytes=peak,
        by_date=by_date,
        country_days=country_days,
    )


def fold_with_aggregate(events: int, dates: int) -> Measured:
    """Fold the topic with what the aggregate service is made of."""
    tune_collector()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_fold_with_aggregate(load_settings(), events, dates))


async def _fold_with_aggregate(settings: Settings, events: int, dates: int) -> Measured:
    async with S3Store(settings) as store, KafkaPublisher(settings, source="bench") as publisher:
        await store.create_bucket()
        await provision_pointer(store)
        folder = CityStatsConsumer(store, publisher, cache_bytes=settings.aggregate_cache_bytes)
        all_folded = asyncio.Event()
        folded = 0

        async def process(batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
            nonlocal folded
            results = await folder.process(batch)
            folded += len(batch)
            if folded >= events:
                all_folded.set()
            return results

        broker = make_broker(settings)
        subscription = consume(
            broker,
            Topic.CITY_STATS,
            process,
            settings=settings,
            retrier=Retrier(health=Health(), wait_max_s=1),
            group=f"bench-{uuid.uuid4().hex}",
            batch_records_max=STATISTICS_BATCH_MAX,
            linger_ms=STATISTICS_LINGER_MS,
            publisher=publisher,
            store=store,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        await broker.connect()
        await subscription.begin()
        await all_folded.wait()
        wall_s, taken_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        await subscription.drain()
        await broker.stop()
        peak = peak_rss_bytes()
        by_date, country_days = await _stored(store, dates)
    return Measured(wall_s=wall_s, cpu_s=taken_cpu_s, peak_rss_bytes=peak, by_date=by_date, country_days=country_days)


async def _stored(store: S3Store, dates: int) -> tuple[dict[dt.date, Sums], int]:
    """Read the live totals of some dates, and count all live summaries."""
    live = (await read_current(store)).live
    by_date = {}
    for day in sorted({dates * place // VERIFIED_DATES for place in range(VERIFIED_DATES)}):
        date = FIRST_DATE + dt.timedelta(days=day)
        sums = NOTHING
        for country, found in (await read_summaries(store, live, date)).items():
            sums = _added(sums, objects.decode(Summary, found.body, keys.summary(live, date, country)).totals)
        by_date[date] = sums
    country_days = 0
    async for _ in store.list(keys.summaries_of_generation(live)):
        country_days += 1
    return by_date, country_days


OURS: Final[dict[str, Callable[[int, int], Measured]]] = {
    "rebuild": fold_with_rebuild,
    "aggregate": fold_with_aggregate,
}
PEERS: Final = {
    "Quix Streams": ["--changelog"],
    "Quix Streams, no changelog": [],
}


class _Turns(NamedTuple):
    """The measurements of one contender by turn, with the CPU seconds of its store."""

    name: str
    store: Store | None
    taken: list[tuple[Measured, float]]


class _Bench:
    """Fills topics, runs contenders in processes of their own, and keeps their medians."""

    def __init__(self, environment: dict[str, str], runs: int, only: list[str] | None) -> None:
        self._environment = {
            **environment,
            "TRIPFOLD_KAFKA_PARTITIONS": str(PARTITIONS),
            "TRIPFOLD_LOG_LEVEL": "error",
        }
        self._runs = runs
        self._only = only
        self.results: list[Result] = []

    def compare(self, events: int, dates: int, contenders: list[tuple[str, Store | None]]) -> None:
        """Let contenders take turns at a topic of so many events, each with the S3 that it writes to.

        Raises AssertionError if one adds up wrongly.
        """
        environment = {**self._environment, "TRIPFOLD_TOPIC_PREFIX": f"{uuid.uuid4().hex}."}
        asyncio.run(_fill(load_settings(environment), events, dates))
        by_date, country_days = expected_of(events, dates)
        turns = [_Turns(name, store, []) for name, store in contenders if self._only is None or name in self._only]
        for _ in range(self._runs):
            for one in list(turns):
                name, store, taken = one
                began_s = cpu_s(store.pid) if store else 0.0
                if store is None:
                    ran = self._run("quix", ["--events", str(events), *PEERS[name]], environment)
                else:
                    arguments = ["--contender", name, "--events", str(events), "--dates", str(dates)]
                    ran = self._run("fold", arguments, {**environment, **_way_to_s3(store)})
                if ran.returncode and store is None and "No module named 'quixstreams'" in ran.stderr:
                    print(f"{name}: left out, it is not installed", file=sys.stderr)
                    turns.remove(one)
                    continue
                assert not ran.returncode, f"{name}: {ran.stderr}"
                measured = msgspec.json.decode(ran.stdout.splitlines()[-1], type=Measured)
                for date, sums in measured.by_date.items():
                    assert sums == by_date[date], f"{name}, {date}: {sums} instead of {by_date[date]}"
                assert len(measured.by_date) >= min(dates, VERIFIED_DATES), f"{name} left dates out"
                assert measured.country_days in {None, country_days}, f"{name}: {measured.country_days} country-days"
                taken.append((measured, cpu_s(store.pid) - began_s if store else 0.0))
        self.results += [_summed_up(one, events) for one in turns]

    def large(self, cities: int) -> Large:
        """Fold a country of so many cities."""
        ran = self._run("fold", ["--cities", str(cities)], self._environment)
        assert not ran.returncode, ran.stderr
        return msgspec.json.decode(ran.stdout, type=Large)

    def _run(self, module: str, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"bench.{module}", *arguments],
            cwd=ROOT,
            env={**environment, "TRIPFOLD_S3_BUCKET": uuid.uuid4().hex},
            capture_output=True,
            text=True,
            check=False,
        )


def _way_to_s3(store: Store) -> dict[str, str]:
    return {name: value for name, value in store.environment.items() if name.startswith(("AWS_", "TRIPFOLD_S3_"))}


async def _fill(settings: Settings, events: int, dates: int) -> None:
    await apply_topics(settings)
    async with KafkaPublisher(settings, source="bench") as publisher:
        await publisher.publish(map(OutgoingEvent, made_up_events(events, dates)))


async def _fold_large(cities: int) -> Large:
    settings = load_settings()
    dice = random.Random(1)
    day = [_event(FIRST_DATE, 0, city, 138_000_000, dice) for city in range(cities)]
    changed = [
        _event(FIRST_DATE, 0, dice.randrange(cities), 138_000_001 + change, dice) for change in range(CHANGES + 1)
    ]
    async with S3Store(settings) as store:
        await store.create_bucket()
        writer = SummaryWriter(store, cache_bytes=settings.aggregate_cache_bytes)
        await writer.fold(1, changed[-1:])  # what is slow the first time alone
        writer = SummaryWriter(store, cache_bytes=settings.aggregate_cache_bytes)

        async def taken(batch: list[CityDayStats]) -> tuple[float, float]:
            wall, cpu = time.perf_counter(), time.process_time()
            await writer.fold(2, batch)
            return time.perf_counter() - wall, time.process_time() - cpu

        size = STATISTICS_BATCH_MAX
        batches = [await taken(day[place : place + size]) for place in range(0, cities, size)]
        ones = [await taken([event]) for event in changed[:-1]]
        found = await store.get(keys.summary(2, FIRST_DATE, day[0].country))
    assert found is not None
    highest = {event.city_id: event for event in [*day, *changed[:-1]]}
    expected = NOTHING
    for event in highest.values():
        expected = _added(expected, event.contribution)
    stored = objects.decode(Summary, found.body, "the large country").totals
    assert _added(NOTHING, stored) == expected, f"{stored} instead of {expected}"
    return Large(
        cities=cities,
        summary_bytes=len(found.body),
        changed_wall_s=statistics.median(wall for wall, _ in ones),
        changed_cpu_s=statistics.median(cpu for _, cpu in ones),
        day_wall_s=sum(wall for wall, _ in batches),
        day_cpu_s=sum(cpu for _, cpu in batches),
    )


def _summed_up(contender: _Turns, events: int) -> Result:
    turns = contender.taken
    wall_s = statistics.median(turn.wall_s for turn, _ in turns)
    taken_cpu_s = statistics.median(turn.cpu_s for turn, _ in turns)
    return Result(
        name=contender.name,
        store=contender.store.name if contender.store else None,
        events=events,
        runs=len(turns),
        wall_s=wall_s,
        cpu_s=taken_cpu_s,
        store_cpu_s=statistics.median(store for _, store in turns),
        events_per_s=events / wall_s,
        events_per_cpu_s=events / taken_cpu_s,
        peak_rss_mb=statistics.median(turn.peak_rss_bytes for turn, _ in turns) / 1e6,
    )


def _print_comparison(results: list[Result], dates: int, broker: str) -> None:
    quix = next((result for result in results if result.name == "Quix Streams"), None)
    print_table(
        f"Folding {results[0].events:,} events of {COUNTRIES} countries on {dates} dates from {broker}",
        ("", "into", "events/s", "times Quix", "events per CPU s", "times Quix, by CPU", "S3's CPU, s", "peak RSS, MB"),
        [
            (
                one.name,
                one.store or "RocksDB",
                round(one.events_per_s),
                one.events_per_s / quix.events_per_s if quix else None,
                round(one.events_per_cpu_s),
                one.events_per_cpu_s / quix.events_per_cpu_s if quix else None,
                one.store_cpu_s if one.store else None,
                round(one.peak_rss_mb),
            )
            for one in results
        ],
    )


def _print_memory(results: list[Result], events: int) -> None:
    sink = next((one.store for one in results if one.store), None)
    by_name = {(one.name, one.events): one for one in results if one.store == sink}
    print_table(
        f"Memory by the number of events, into {sink}",
        ("", f"{events // FEWER:,} events, MB", f"{events:,} events, MB"),
        [
            (name, *(round(by_name[name, size].peak_rss_mb) for size in (events // FEWER, events)))
            for name in OURS
            if (name, events) in by_name
        ],
    )


def _print_large(large: list[Large]) -> None:
    def row(name: str, one: Large, *, of: Large | None = None) -> tuple[object, ...]:
        values = (one.summary_bytes / 1e6, 1e3 * one.changed_cpu_s, 1e3 * one.changed_wall_s, one.day_cpu_s)
        others = (of.summary_bytes / 1e6, 1e3 * of.changed_cpu_s, 1e3 * of.changed_wall_s, of.day_cpu_s) if of else ()
        shown = [value / other for value, other in zip(values, others, strict=True)] if of else list(values)
        day = (1e3 * one.day_cpu_s / one.cities) / (1e3 * of.day_cpu_s / of.cities if of else 1)
        return name, *shown, day

    print_table(
        "A country of many cities",
        ("cities", "summary, MB", "one changed city, CPU ms", "ms", "a full day, CPU s", "CPU ms an event"),
        [*(row(f"{one.cities:,}", one) for one in large), row("grows by", large[-1], of=large[0])],
        note="A full day comes in batches as the aggregate takes them.",
    )


if __name__ == "__main__":
    main()
