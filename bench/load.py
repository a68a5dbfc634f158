"""Load a deployment, and watch its memory and file descriptors. Run it as `python -m bench.load`.

API, planner, aggregate and two workers run on Apache Kafka and a sink for S3. Three parts follow each other:

* `date`: one date of a thousand cities with files of 1 MB, and of fifty with files of 100 MB.
* `api`: 200 requests a second for ten minutes, while a date is processed again every ten seconds.
* `soak`: for an hour, dates are processed one after the other, and the API gets ten requests a second.

A request is sent at its time in the schedule, whether or not earlier ones have a response. Its latency counts from that
time, so a response that is late delays no other measurement. The soak looks at each process every ten seconds. It
compares the median of the second quarter of the time with that of the last quarter; the first quarter warms up.

Bias: everything shares the cores of this machine, this client included. A status other than 200 and 304 counts as an
error, and errors in either of the last two parts fail the benchmark. A request without a response has no latency.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from itertools import cycle
from pathlib import Path
from typing import Final, NamedTuple

import httpx
import httpx_aiohttp
import msgspec

from bench.context import end_in_order, peak_rss_bytes
from bench.sizing import Load
from bench.sizing_run import Servers, process_date, running_deployment, servers, upstream_of
from bench.tables import print_table
from bench.upstream import LARGE_BLOCKS

FIRST: Final = dt.date(2024, 5, 1)
WORKERS: Final = 2
FILE_MB: Final = 1.0
SMALL_CITIES: Final = 1_000
LARGE_CITIES: Final = 50
CITIES: Final = 30
DATES: Final = [str(FIRST + dt.timedelta(days=number)) for number in range(31)]
REQUESTS_PER_S: Final = 200
SOAK_REQUESTS_PER_S: Final = 10
PROCESS_INTERVAL_S: Final = 10.0
LOOK_INTERVAL_S: Final = 10.0
EXPECTED: Final = frozenset({200, 304})
MIX: Final = ("month, unchanged",) * 8 + ("month",) * 6 + ("day",) * 3 + ("ledger",) * 2 + ("requests",)
"""The kinds of twenty requests."""


class Dated(msgspec.Struct, frozen=True, kw_only=True):
    """One date of many cities. ``peak_mb`` is the most resident memory of each process since its start."""

    cities: int
    megabytes: float
    wall_s: float
    peak_mb: dict[str, float]


class Requested(msgspec.Struct, frozen=True, kw_only=True):
    """The latencies of one kind of request, in milliseconds, and its errors. Latencies are None without a response."""

    kind: str
    responses: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    errors: dict[str, int]


class Look(NamedTuple):
    """The resident memory and the open files of a process at one moment."""

    megabytes: float
    files: int


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """Memory and file descriptors of a process: medians of the second and of the last quarter of the time."""

    process: str
    early_mb: float
    late_mb: float
    early_files: float
    late_files: float


class Soaked(msgspec.Struct, frozen=True, kw_only=True):
    """The soak: the number of completed dates, the requests, and each process."""

    dates: int
    requests: list[Requested]
    processes: list[Watched]


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The measurements of a run. ``load`` is the load average of the machine when it ended."""

    date: Dated
    api: list[Requested]
    soaked_s: float
    soaked: Soaked
    load: float

    @property
    def failed(self) -> bool:
        """Whether any request of the API or of the soak failed."""
        return any(one.errors for one in (*self.api, *self.soaked.requests))


def main() -> None:
    """Run the parts one after the other, print their tables, and exit with 1 after an error."""
    parser = argparse.ArgumentParser(description="Load a deployment, and watch its memory and file descriptors.")
    parser.add_argument("--seconds", type=float, help="of the requests; default: 600, with --quick 20")
    parser.add_argument("--soak-seconds", type=float, help="default: 3600, with --quick 60")
    parser.add_argument("--rate", type=int, default=REQUESTS_PER_S, help="requests a second")
    parser.add_argument("--quick", action="store_true", help="shorter, and a twentieth of the cities")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    end_in_order()
    share = 20 if options.quick else 1
    with servers() as running:
        date = _measure_date(running, SMALL_CITIES // share, max(1, LARGE_CITIES // share))
        load = Load(cities=CITIES, megabytes=FILE_MB, workers=WORKERS)
        with upstream_of(running, load, date=str(FIRST)) as (environment, _):
            environment |= {"TRIPFOLD_API_REQUESTS_PER_MINUTE": "1000000"}
            api, soaked = asyncio.run(
                _measure_api_and_soak(
                    environment,
                    rate=options.rate,
                    seconds=options.seconds or (20 if options.quick else 600),
                    soak_s=(soak_s := options.soak_seconds or (60 if options.quick else 3600)),
                )
            )
    results = Results(date=date, api=api, soaked_s=soak_s, soaked=soaked, load=os.getloadavg()[0])
    _print(results, rate=options.rate)
    if options.json:
        options.json.write_text(json.dumps(msgspec.to_builtins(results), indent=2) + "\n")
    if results.failed:
        sys.exit("some requests failed")


def _measure_date(running: Servers, small: int, large: int) -> Dated:
    load = Load(cities=small, megabytes=FILE_MB, workers=WORKERS)
    with upstream_of(running, load, date=str(FIRST), large=large) as (environment, _):
        environment |= {"TRIPFOLD_LOG_LEVEL": "error"}
        return asyncio.run(_process_many(environment, small, large))


async def _process_many(environment: dict[str, str], small: int, large: int) -> Dated:
    async with _client() as client, running_deployment(environment, WORKERS) as processes:
        began_s = time.perf_counter()
        await process_date(client, processes["api"][1], str(FIRST))
        return Dated(
            cities=small + large,
            megabytes=FILE_MB * (small + large * LARGE_BLOCKS),
            wall_s=time.perf_counter() - began_s,
            peak_mb={name: peak_rss_bytes(pid) / 1e6 for name, (pid, _) in processes.items()},
        )


async def _measure_api_and_soak(
    environment: dict[str, str], *, rate: int, seconds: float, soak_s: float
) -> tuple[list[Requested], Soaked]:
    async with _client() as client, running_deployment(environment, WORKERS) as processes:
        api_url = processes["api"][1]
        for date in DATES:
            await process_date(client, api_url, date)
        async with _dates_processed(client, api_url, pause_s=PROCESS_INTERVAL_S):
            api = await _send_requests(client, api_url, rate=rate, seconds=seconds)
        async with _watched(processes) as looks, _dates_processed(client, api_url, pause_s=0) as processed:
            requests = await _send_requests(client, api_url, rate=SOAK_REQUESTS_PER_S, seconds=soak_s)
        compared = [_compared(name, found) for name, found in looks.items()]
        return api, Soaked(dates=len(processed), requests=requests, processes=compared)


def _client() -> httpx.AsyncClient:
    """Return a client that costs little, because it shares the cores with what is measured."""
    return httpx_aiohttp.HttpxAiohttpClient(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=None))


@contextlib.asynccontextmanager
async def _in_background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def _dates_processed(client: httpx.AsyncClient, api_url: str, *, pause_s: float) -> AsyncIterator[list[str]]:
    """Process dates again and again meanwhile; yield the dates that are completed."""
    processed: list[str] = []

    async def process() -> None:
        for date in cycle(DATES):
            await process_date(client, api_url, date)
            processed.append(date)
            await asyncio.sleep(pause_s)

    async with _in_background(process()):
        yield processed


@contextlib.asynccontextmanager
async def _watched(processes: dict[str, tuple[int, str]]) -> AsyncIterator[dict[str, list[Look]]]:
    """Look at each process meanwhile; yield the looks."""
    looks: dict[str, list[Look]] = {name: [_look(pid)] for name, (pid, _) in processes.items()}

    async def watch() -> None:
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            for name, (pid, _) in processes.items():
                looks[name].append(_look(pid))

    async with _in_background(watch()):
        yield looks


def _look(pid: int) -> Look:
    resident_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Look(resident_pages * os.sysconf("SC_PAGE_SIZE") / 1e6, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))


def _compared(process: str, looks: list[Look]) -> Watched:
    quarter = max(1, len(looks) // 4)
    early, late = looks[quarter : 2 * quarter] or looks, looks[-quarter:]
    return Watched(
        process=process,
        early_mb=statistics.median(one.megabytes for one in early),
        late_mb=statistics.median(one.megabytes for one in late),
        early_files=statistics.median(one.files for one in early),
        late_files=statistics.median(one.files for one in late),
    )


async def _send_requests(client: httpx.AsyncClient, api_url: str, *, rate: int, seconds: float) -> list[Requested]:
    """Send requests at their times, and return the latencies by kind."""
    month = f"{api_url}/country-stats?from={DATES[0]}&to={DATES[-1]}"
    day = f"{api_url}/country-stats?from={DATES[0]}&to={DATES[0]}"
    full = await client.get(day)
    urls = {
        "month": month,
        "month, unchanged": month,
        "day": day,
        "ledger": f"{api_url}/country-stats/{next(iter(full.json()))}/{DATES[0]}",
        "requests": f"{api_url}/process-requests",
    }
    etag = (await client.get(month)).headers["etag"]
    latencies: dict[str, list[float]] = {kind: [] for kind in urls}
    errors: dict[str, Counter[str]] = {kind: Counter() for kind in urls}

    async def send(kind: str, due_s: float) -> None:
        headers = {"if-none-match": etag} if kind == "month, unchanged" else {}
        try:
            status = (await client.get(urls[kind], headers=headers)).status_code
        except httpx.HTTPError as error:
            errors[kind][type(error).__name__] += 1
            return
        latencies[kind].append((time.perf_counter() - due_s) * 1000)
        if status not in EXPECTED:
            errors[kind][str(status)] += 1

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, kind in zip(range(round(rate * seconds)), cycle(MIX), strict=False):
            due_s = began_s + number / rate
            await asyncio.sleep(max(0, due_s - time.perf_counter()))
            tasks.create_task(send(kind, due_s))
    return [_requested(kind, latencies[kind], errors[kind]) for kind in urls]


def _requested(kind: str, latencies_ms: list[float], errors: Counter[str]) -> Requested:
    ordered = sorted(latencies_ms)
    return Requested(
        kind=kind,
        responses=len(ordered),
        p50_ms=_percentile(ordered, 50),
        p95_ms=_percentile(ordered, 95),
        p99_ms=_percentile(ordered, 99),
        max_ms=_percentile(ordered, 100),
        errors=dict(errors),
    )


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    """Return the percentile of sorted values by the nearest rank, or None without values."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else None


def _print(results: Results, *, rate: int) -> None:
    date = results.date
    print_table(
        "One date of many cities",
        ("cities", "MB", "seconds", "MB/s", *(f"{name}, MB" for name in date.peak_mb)),
        [
            (str(date.cities), date.megabytes, date.wall_s, date.megabytes / date.wall_s, *date.peak_mb.values()),
        ],
        note="The last columns are the most memory of each process (RSS).",
    )
    for per_second, requests in ((rate, results.api), (SOAK_REQUESTS_PER_S, results.soaked.requests)):
        print_table(
            f"{per_second} requests a second",
            ("request", "responses", "p50 ms", "p95 ms", "p99 ms", "max ms", "errors"),
            [
                (one.kind, one.responses, one.p50_ms, one.p95_ms, one.p99_ms, one.max_ms, sum(one.errors.values()))
                for one in requests
            ],
        )
    print_table(
        f"{results.soaked_s:.0f} s of dates, {results.soaked.dates} in all",
        ("process", "MB, second quarter", "MB, last quarter", "files, second quarter", "files, last quarter"),
        [(one.process, one.early_mb, one.late_mb, one.early_files, one.late_files) for one in results.soaked.processes],
        note=f"Load average of the machine at the end: {results.load:.1f}.",
    )


if __name__ == "__main__":
    main()
