"""Measure a request beside a queued year of backfill. Run it as `python -m bench.fairness`.

API, planner, aggregate and 1 or 2 workers run on Apache Kafka and a sink for S3. Requests of single dates follow each
other: first while nothing else runs, then while a backfill of a year is in progress. That backfill has as many dates
under way as one may have. The benchmark compares the times from the request until its numbers are served.

Bias: all processes share the cores of this machine, so the backfill also takes processor time from the API, the broker
and the store. Another load on the machine makes both times noise; the table has the load.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import os
import statistics
import time
from pathlib import Path
from typing import Final

import httpx
import msgspec

from bench.context import end_in_order
from bench.sizing import Load
from bench.sizing_run import Servers, process_date, running_deployment, servers, upstream_of
from bench.tables import print_table
from shared.domain.backfills import MAX_PARALLEL_MAX

FIRST: Final = dt.date(2024, 5, 1)
YEAR: Final = ("2023-01-01", "2023-12-31")
CITIES: Final = 40
FILE_MB: Final = 0.2
WORKERS: Final = (1, 2)
BEGUN_AFTER_S: Final = 10.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The times of requests in seconds, alone and beside a backfill, and what the backfill did meanwhile."""

    workers: int
    alone_p95_s: float
    beside_p95_s: float
    alone_median_s: float
    beside_median_s: float
    backfill_dates: int
    load: float

    @property
    def ratio(self) -> float:
        """How many times longer a request takes beside the backfill."""
        return self.beside_p95_s / self.alone_p95_s


def main() -> None:
    """Measure for each number of workers, and print a table."""
    parser = argparse.ArgumentParser(description="Measure a request beside a queued year of backfill.")
    parser.add_argument("--runs", type=int, help="requests of each kind; default: 15, with --quick 10")
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    end_in_order()
    requests = options.runs or (10 if options.quick else 15)
    with servers() as running:
        results = [measure(running, workers=workers, requests=requests) for workers in WORKERS]
    print_table(
        f"A request of {CITIES} cities beside a year of backfill ({requests} requests)",
        ("workers", "alone, p95 s", "beside, p95 s", "ratio", "alone, median s", "beside, median s", "dates", "load"),
        [
            (
                str(one.workers),
                one.alone_p95_s,
                one.beside_p95_s,
                one.ratio,
                one.alone_median_s,
                one.beside_median_s,
                one.backfill_dates,
                one.load,
            )
            for one in results
        ],
        note="dates: those of the backfill that were completed meanwhile. load: of the machine, over a minute.",
    )
    if options.json:
        options.json.write_text(json.dumps(msgspec.to_builtins(results), indent=2) + "\n")


def measure(running: Servers, *, workers: int, requests: int) -> Measured:
    """Measure with new topics, a new bucket and new processes."""
    load = Load(cities=CITIES, megabytes=FILE_MB, workers=workers)
    with upstream_of(running, load, date=str(FIRST)) as (environment, _):
        return asyncio.run(_measure(environment, workers=workers, requests=requests))


async def _measure(environment: dict[str, str], *, workers: int, requests: int) -> Measured:
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as client,
        running_deployment(environment, workers) as processes,
    ):
        api_url = processes["api"][1]
        await _times(client, api_url, FIRST - dt.timedelta(days=2), 2)  # the first requests wait for connections
        alone = await _times(client, api_url, FIRST, requests)
        query: dict[str, str | int] = {"from": YEAR[0], "to": YEAR[1], "only": "all", "max_parallel": MAX_PARALLEL_MAX}
        made = await client.post(f"{api_url}/backfills", params=query)
        made.raise_for_status()
        await asyncio.sleep(BEGUN_AFTER_S)
        beside = await _times(client, api_url, FIRST + dt.timedelta(days=requests), requests)
        backfill = (await client.get(f"{api_url}{made.headers['location']}")).json()
    assert backfill["status"] == "running", backfill
    return Measured(
        workers=workers,
        alone_p95_s=_p95(alone),
        beside_p95_s=_p95(beside),
        alone_median_s=statistics.median(alone),
        beside_median_s=statistics.median(beside),
        backfill_dates=backfill["counts"]["dates_completed"],
        load=os.getloadavg()[0],
    )


async def _times(client: httpx.AsyncClient, api_url: str, first: dt.date, requests: int) -> list[float]:
    """Request dates one after the other, and return how long each takes."""
    times = []
    for number in range(requests):
        began_s = time.perf_counter()
        await process_date(client, api_url, str(first + dt.timedelta(days=number)))
        times.append(time.perf_counter() - began_s)
    return times


def _p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20, method="inclusive")[-1]


if __name__ == "__main__":
    main()
