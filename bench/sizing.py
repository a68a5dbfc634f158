"""Predict what a deployment needs, and compare predictions with a real one: `python -m bench.sizing`.

    python -m bench.sizing --cities 1000 --megabytes 100 --workers 2 4

predicts, and needs no measurement.

    python -m bench.sizing [--quick]

compares predictions with measurements.

The model multiplies the cost of a city-day (`Costs`) by the number of city-days, and names the resource that takes
longest. Partitions divide the cities unevenly, so the busiest worker decides; the model asks the partitioner.

The comparison runs API, planner, aggregate and 1, 2 and 4 workers on Apache Kafka (`bench.sizing_run`). Two loads
of one worker give the processor time of a city and of a megabyte. Their sizes differ from the predicted load.
All other predictions come from the constants below, as those of the first command do.

Bias: everything shares the cores of this machine, so four workers on two cores are no faster than two. The store is a
sink in memory. Beyond the measured loads the model extrapolates. It knows no slow disk, no throttled bucket and no
network between machines.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from bench.tables import print_table
from shared.domain.topics import partition_of

if TYPE_CHECKING:
    from bench import sizing_run

DATE: Final = dt.date(2024, 5, 1)
PART_BYTES: Final = 5 * 1024 * 1024
UPSTREAM_REQUESTS_PER_S: Final = 20
"""The default of TRIPFOLD_UPSTREAM_REQUESTS_PER_S, which holds for each worker."""
RETENTION_DAYS: Final = 30
REPLICAS: Final = 3

WRITE_USD: Final = 5.0 / 1e6
READ_USD: Final = 0.4 / 1e6
GB_MONTH_USD: Final = 0.023
"""List prices of S3 in us-east-1, 2026: a write or listing, a read, a gigabyte of standard storage."""

RAW_READS: Final = 11
RAW_WRITES: Final = 2
"""Reads and writes of a worker for a city-day, without those of the raw object: the manifest, a note on the attempt,
and the manifests of eight earlier weeks."""
DATE_READS: Final = 35
DATE_WRITES: Final = 15
COUNTRY_READS: Final = 4

TASK_BYTES: Final = 2_500
"""Bytes of a city-day in the topics that expire: its task and its steps of the request."""
STAT_BYTES: Final = 1_100
SUMMARY_BYTES: Final = 700

IDLE_CORES: Final = 0.02
"""Cores that a worker uses without a task: heartbeats, polls, checks of readiness."""
IDLE_MB: Final = {"api": 85, "planner": 89, "aggregate": 78, "worker": 92}
STREAM_MB: Final = 9
STREAM_MB_MAX: Final = 55
"""Memory of one stream, as measured, and as the sum of its bounds (docs/explanation/performance.md)."""


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Processor time in seconds of one core, as measured on an idle machine of two cores."""

    worker_city_s: float = 0.013
    worker_mb_s: float = 0.0049
    other_city_s: float = 0.0
    other_mb_s: float = 0.0
    """By the processes that share the cores with the workers: none in production."""
    aggregate_city_s: float = 0.006
    cores_per_worker: float = 1.25
    """Cores that a busy worker uses: its event loop and its parsing threads share Python's interpreter lock."""
    fixed_s: float = 1.0
    """Time of a date with one small city."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The city-days of a date, and the workers that ingest them."""

    cities: int
    megabytes: float
    workers: int
    countries: int = 10
    partitions: int = 12
    streams: int = 4
    upstream_mb_s: float | None = None
    """Megabytes a second that the upstream or the network between can send; None: any number."""
    first_city: int = 0
    cores: float | None = None
    """Cores that all processes share; None: each worker has the cores that it can use."""

    @property
    def busiest_cities(self) -> int:
        """Cities of the worker whose partitions have most of them."""
        found: Counter[int] = Counter()
        partitions = range(self.partitions)
        for city in range(self.first_city, self.first_city + self.cities):
            found[partition_of(f"{DATE}/{city}".encode(), partitions, partitions) % self.workers] += 1
        return max(found.values())


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """The needs of a date. ``limits_s`` has its time in seconds, if only one resource were limited."""

    limits_s: dict[str, float]
    worker_cpu_s: float
    worker_mb: float
    worker_mb_max: float
    reads: int
    writes: int
    expiring_bytes: int
    compacted_bytes: int
    """After compaction; ``compactable_bytes`` before."""
    compactable_bytes: int

    @property
    def bottleneck(self) -> str:
        """The resource that takes longest."""
        return max(self.limits_s, key=lambda name: self.limits_s[name])

    @property
    def time_s(self) -> float:
        """The time of a date."""
        return self.limits_s[self.bottleneck]


def predict(load: Load, costs: Costs) -> Prediction:
    """Return what a date of a load needs."""
    city_s = costs.worker_city_s + load.megabytes * costs.worker_mb_s
    limits_s = {
        "the busiest worker's processor": load.busiest_cities * city_s / costs.cores_per_worker,
        "one aggregate's processor": load.cities * costs.aggregate_city_s,
        f"{UPSTREAM_REQUESTS_PER_S} requests/s of a worker": load.busiest_cities / UPSTREAM_REQUESTS_PER_S,
    }
    if load.upstream_mb_s is not None:
        limits_s[f"{load.upstream_mb_s:g} MB/s from the upstream"] = load.cities * load.megabytes / load.upstream_mb_s
    if load.cores is not None:
        all_s = city_s + costs.other_city_s + load.megabytes * costs.other_mb_s
        limits_s[f"{load.cores:.1f} cores for all processes"] = load.cities * all_s / load.cores
    limits_s = {name: costs.fixed_s + time_s for name, time_s in limits_s.items()}
    size_bytes = load.megabytes * 1e6
    parts = 1 if size_bytes <= PART_BYTES else math.ceil(size_bytes / PART_BYTES) + 2
    streams = min(load.streams, load.cities)
    return Prediction(
        limits_s=limits_s,
        worker_cpu_s=load.cities * city_s + load.workers * max(limits_s.values()) * IDLE_CORES,
        worker_mb=IDLE_MB["worker"] + streams * STREAM_MB,
        worker_mb_max=IDLE_MB["worker"] + load.streams * STREAM_MB_MAX,
        reads=load.cities * RAW_READS + load.countries * COUNTRY_READS + DATE_READS,
        # The aggregate writes a summary for each city, as they end at different times, and the request once a second.
        writes=load.cities * (RAW_WRITES + parts + 1) + round(max(limits_s.values())) + DATE_WRITES,
        expiring_bytes=load.cities * TASK_BYTES,
        compacted_bytes=load.cities * STAT_BYTES + load.countries * SUMMARY_BYTES,
        compactable_bytes=load.cities * (STAT_BYTES + SUMMARY_BYTES),
    )


def size_rows(loads: list[Load], costs: Costs) -> list[tuple[str, ...]]:
    """Return the rows of a table with a column for each deployment. It processes a date a day, and keeps a year."""
    columns = [_size(load, costs) for load in loads]
    return [(name, *(column[name] for column in columns)) for name in columns[0]]


def _size(load: Load, costs: Costs) -> dict[str, str]:
    found = predict(load, costs)
    raw_gb = load.cities * load.megabytes * 365 / 1e3
    kafka_gb = REPLICAS * (found.expiring_bytes * RETENTION_DAYS + found.compacted_bytes * 365) / 1e9
    requests_usd = 30 * (found.writes * WRITE_USD + found.reads * READ_USD)
    return {
        "a date takes": _duration(found.time_s),
        "first bottleneck": found.bottleneck,
        "cities of the busiest worker": f"{load.busiest_cities}",
        "the upstream sends": f"{load.cities * load.megabytes / found.time_s:,.0f} MB/s",
        "memory of a worker, usual": f"{found.worker_mb:.0f} MB",
        "memory of a worker, at most": f"{found.worker_mb_max:.0f} MB",
        "S3 writes of a date": f"{found.writes:,}",
        "S3 reads of a date": f"{found.reads:,}",
        "S3 requests, a month": f"${requests_usd:,.2f}",
        "raw files of a year": f"{raw_gb:,.0f} GB",
        "raw files of a year, a month": f"${raw_gb * GB_MONTH_USD:,.0f}",
        f"Kafka, a year, {REPLICAS} replicas": f"{kafka_gb:.2f} GB",
    }


def _duration(time_s: float) -> str:
    return f"{time_s:.0f} s" if time_s < 120 else f"{time_s / 60:.1f} min"


def main() -> None:
    """Print a prediction, or compare predictions with measurements."""
    parser = argparse.ArgumentParser(description="Predict what a deployment needs.")
    parser.add_argument("--cities", type=int, help="predict for so many cities; without it, measure on this machine")
    parser.add_argument("--megabytes", type=float, default=100, help="size of a file; default: 100")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="worker processes; default: 1 2 4")
    parser.add_argument("--countries", type=int, default=10, help="countries of the cities; default: 10")
    parser.add_argument("--partitions", type=int, default=12, help="partitions of city-tasks; default: 12")
    parser.add_argument("--streams", type=int, default=4, help="TRIPFOLD_INGEST_STREAMS; default: 4")
    parser.add_argument("--upstream-mb-s", type=float, help="what the upstream can send; default: no limit")
    parser.add_argument("--quick", action="store_true", help="measure with smaller files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there too")
    options = parser.parse_args()
    if options.cities is None:
        _compare(quick=options.quick, json_path=options.json)
        return
    for name in ("cities", "megabytes", "countries", "partitions", "streams", "upstream_mb_s"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value:g}; it must be more than 0")
    if not all(0 < workers <= options.partitions for workers in options.workers):
        parser.error(f"--workers is {options.workers}; it must be 1 to {options.partitions}, the number of partitions")
    loads = [
        Load(
            cities=options.cities,
            megabytes=options.megabytes,
            workers=workers,
            countries=options.countries,
            partitions=options.partitions,
            streams=options.streams,
            upstream_mb_s=options.upstream_mb_s,
        )
        for workers in options.workers
    ]
    title = f"{options.cities:,} cities of {options.megabytes:g} MB, once a day, {options.partitions} partitions"
    print_table(title, ("workers", *map(str, options.workers)), size_rows(loads, Costs()))


def _compare(*, quick: bool, json_path: Path | None) -> None:
    """Measure 1, 2 and 4 workers, and print what the model predicts beside it."""
    from bench import sizing_run  # noqa: PLC0415 - a prediction needs neither Kafka nor the services

    loads = [
        Load(cities=40, megabytes=0.1, workers=1),
        Load(cities=16, megabytes=4 if quick else 16, workers=1),
        *(Load(cities=24, megabytes=6 if quick else 20, workers=workers) for workers in (1, 2, 4)),
    ]
    loads = [msgspec.structs.replace(load, first_city=sizing_run.FIRST_CITY) for load in loads]
    with sizing_run.servers() as servers:
        sizing_run.measure(servers, loads[0], date=DATE.isoformat())  # warms Kafka's virtual machine up
        measured = [sizing_run.measure(servers, load, date=DATE.isoformat()) for load in loads]
    loads = [
        msgspec.structs.replace(load, cores=max(0.1, (os.cpu_count() or 1) - one.others_cores))
        for load, one in zip(loads, measured, strict=True)
    ]
    costs = fit((loads[0], measured[0]), (loads[1], measured[1]))
    _print_comparison(loads[2:], measured[2:], costs)
    if json_path:
        found = {"costs": costs, "loads": loads, "measured": measured}
        json_path.write_text(json.dumps(msgspec.to_builtins(found), indent=2) + "\n")


def fit(*runs: tuple[Load, sizing_run.Measured]) -> Costs:
    """Return the costs by city and by megabyte that explain two runs with files of different sizes."""
    (small_load, small), (large_load, large) = runs
    worker_city_s, worker_mb_s = _line(small_load, small.cpu_s["worker"], large_load, large.cpu_s["worker"])
    others = [sum(one.cpu_s.values()) - one.cpu_s["worker"] for one in (small, large)]
    other_city_s, other_mb_s = _line(small_load, others[0], large_load, others[1])
    costs = Costs(
        worker_city_s=worker_city_s,
        worker_mb_s=worker_mb_s,
        other_city_s=other_city_s,
        other_mb_s=other_mb_s,
        fixed_s=0,
        aggregate_city_s=small.cpu_s["aggregate"] / small_load.cities,
    )
    fixed_s = max(0.0, small.wall_s - predict(small_load, costs).time_s)
    return msgspec.structs.replace(costs, fixed_s=fixed_s)


def _line(small_load: Load, small_s: float, large_load: Load, large_s: float) -> tuple[float, float]:
    """Return the seconds by city and by megabyte that give both times; none is negative."""
    each_small, each_large = small_s / small_load.cities, large_s / large_load.cities
    mb_s = max(0.0, (each_large - each_small) / (large_load.megabytes - small_load.megabytes))
    return max(0.0, each_small - mb_s * small_load.megabytes), mb_s


def _print_comparison(loads: list[Load], measured: list[sizing_run.Measured], costs: Costs) -> None:
    print_table(
        "Costs of this machine, from two loads of one worker",
        ("processor time", "ms"),
        [
            ("a worker, for a city", costs.worker_city_s * 1e3),
            ("a worker, for a megabyte", costs.worker_mb_s * 1e3),
            ("all others, for a city", costs.other_city_s * 1e3),
            ("all others, for a megabyte", costs.other_mb_s * 1e3),
        ],
    )
    rows = []
    for load, one in zip(loads, measured, strict=True):
        found = predict(load, costs)
        for name, predicted, actual in (
            ("time, s", found.time_s, one.wall_s),
            ("processor time of the workers, s", found.worker_cpu_s, one.cpu_s["worker"]),
            ("memory of the largest worker, MB", found.worker_mb, one.worker_mb),
            ("S3 writes", found.writes, one.s3_writes),
            ("S3 reads", found.reads, one.s3_reads),
            ("Kafka, topics that expire, kB", found.expiring_bytes / 1e3, one.expiring_bytes / 1e3),
            ("Kafka, before compaction, kB", found.compactable_bytes / 1e3, one.compacted_bytes / 1e3),
        ):
            rows.append((str(load.workers), name, predicted, actual, actual / predicted))
    shared = ", ".join(f"{load.cores:.1f}" for load in loads)
    print_table(
        f"{loads[0].cities} cities of {loads[0].megabytes:g} MB",
        ("workers", "quantity", "predicted", "measured", "ratio"),
        rows,
        note=f"Other programs left so many cores free, which the predicted times count: {shared}.",
    )


if __name__ == "__main__":
    main()
