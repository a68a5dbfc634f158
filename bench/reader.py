"""Measure how fast the API serves `GET /country-stats`, next to other ways to read the same summaries.

`python -m bench.reader` starts the API as a process of its own. The API reads generated summaries from an S3 server
(`bench.summaries`): another process, which makes each object on request. The benchmark requests a year of two hundred
countries; `--days 3652` requests ten. The first request finds an empty cache and Parquet tables (cold). The next ones
repeat it: unchanged, with the ETag (304), and after all summaries of one day changed. One writer counts this change in
the change index. Requests that repeat have the median of their times (p50), and the highest. Then fifty clients request
a month each at once.

Two peers read the same summaries once each. The same API reads the year without a cache. DuckDB reads a month: its
httpfs is not on any package index, so boto3 fetches 32 objects at a time for it, and DuckDB parses and sums them. A
year of 73,000 objects would take minutes, so the row of the year multiplies the time and the requests of the month. It
says *extrapolated*.

A time ends with the last byte of the response: the client decodes the body later, or never.

Bias: everything is on one machine, so S3 has almost no latency, and its server takes CPU time from the API. Over a
network, requests count for more and CPU for less, so every row has the requests to S3. A response that would take
longer than the API's own deadline is 503, and is requested again: `tries` says how often. The API keeps what it has
read by then.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import httpx

from bench.context import cpu_s
from bench.summaries import FOLDER
from bench.tables import print_table
from tripfold.local.ports import free_port
from tripfold.local.supervisor import http_probe

ROOT: Final = Path(__file__).resolve().parent.parent
FIRST: Final = dt.date(2015, 1, 1)
CLIENTS: Final = 50
ROUNDS: Final = 4
MONTH_DAYS: Final = 31
TRIES_MAX: Final = 60
START_DEADLINE_S: Final = 180
GETS_AT_ONCE: Final = 32
CREDENTIALS: Final = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}

Row = dict[str, Any]


def main() -> None:
    """Start the servers, ask, and print the tables."""
    parser = argparse.ArgumentParser(description="Measure how fast statistics are read.")
    parser.add_argument("--countries", type=int, help="default: 200, with --quick 20")
    parser.add_argument("--days", type=int, action="append", help="ranges; default: 365, with --quick 90")
    parser.add_argument("--runs", type=int, default=11, help="of what is unchanged or changed; the median counts")
    parser.add_argument("--quick", action="store_true", help="fewer summaries")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    countries = options.countries or (20 if options.quick else 200)
    ranges = options.days or ([90] if options.quick else [365])
    results = []
    with store(max(ranges), countries) as s3:
        httpx.post(s3, params={"tables": max(ranges)}, timeout=3_600)
        for days in ranges:
            results += of_one_client(s3, days, countries, options.runs)
        clients = [of_many_clients(s3, countries)]
        peers = of_peers(s3, min(ranges), countries)
    columns = ("days", "p50, s", "max, s", "tries", "S3 lists", "S3 gets", "MB", "API's CPU, s", "API's memory, MB")
    print_table(f"One client, {countries} countries", ("query", *columns), rows_of(results, columns))
    columns = ("queries", "p50, s", "p99, s", "S3 requests a query", "API's memory, MB")
    print_table(f"{CLIENTS} clients at once, a month each", ("", *columns), rows_of(clients, columns))
    columns = ("days", "seconds", "S3 lists", "S3 gets", "memory, MB")
    print_table(
        "Other readers of the same summaries",
        ("reader", *columns),
        rows_of(peers, columns),
        note="Extrapolated: not measured, but the row of the month times the number of months.",
    )
    if options.json:
        options.json.write_text(json.dumps({"one": results, "many": clients, "peers": peers}, indent=2) + "\n")


def of_one_client(s3: str, days: int, countries: int, runs: int) -> list[Row]:
    """Ask for one range, cold, warm and after a change, with a cache that holds it."""
    last = FIRST + dt.timedelta(days=days - 1)
    path = f"/country-stats?from={FIRST}&to={last}"
    with (
        api(s3, cache_bytes=days * countries * 1_500) as (url, process),
        httpx.Client(base_url=url, timeout=300) as http,
    ):

        def ask(what: str, headers: dict[str, str] | None = None, *, change: bool = False) -> Row:
            if change:
                httpx.post(s3, params={"change": str(last)}, timeout=30)
            lists, gets = counts(s3)
            cpu = cpu_s(process.pid)
            tries, took_s, sent_bytes, response = persistently(http, path, headers)
            after = counts(s3)
            same = response.status_code == httpx.codes.NOT_MODIFIED
            assert same == (headers is not None), f"{what}: {response.status_code}"
            assert same or len(response.json()) == countries, "countries are missing"
            return {
                "": what,
                "days": days,
                "p50, s": took_s,
                "max, s": took_s,
                "tries": tries,
                "S3 lists": after[0] - lists,
                "S3 gets": after[1] - gets,
                "MB": sent_bytes / 1e6,
                "API's CPU, s": cpu_s(process.pid) - cpu,
                "API's memory, MB": memory_mb(process.pid),
                "etag": response.headers["etag"],
            }

        cold = ask("cold")
        unchanged = middle([ask("unchanged") for _ in range(runs)])
        same = middle([ask("unchanged, 304", {"If-None-Match": unchanged["etag"]}) for _ in range(runs)])
        return [cold, unchanged, same, middle([ask("one day changed", change=True) for _ in range(runs)])]


def of_many_clients(s3: str, countries: int) -> Row:
    """Let many clients ask at once, each for a month and each time anew, of which the API has read all before."""
    months = [(FIRST + dt.timedelta(days=28 * place), FIRST + dt.timedelta(days=28 * place + 27)) for place in range(3)]
    paths = [f"/country-stats?from={first}&to={last}" for first, last in months]

    async def ask(http: aiohttp.ClientSession, client: int) -> list[float]:
        took = []
        for round_ in range(ROUNDS):
            began_s = time.perf_counter()
            async with http.get(paths[(client + round_) % len(paths)]) as response:
                await response.read()
            took.append(time.perf_counter() - began_s)
        return took

    async def all_at_once(url: str) -> list[float]:
        async with aiohttp.ClientSession(url, auto_decompress=False, raise_for_status=True) as http:
            return [s for took in await asyncio.gather(*(ask(http, one) for one in range(CLIENTS))) for s in took]

    with api(s3, cache_bytes=90 * countries * 1_500) as (url, process):
        with httpx.Client(base_url=url, timeout=300) as http:
            for path in paths:
                persistently(http, path)
        before = sum(counts(s3))
        took = sorted(asyncio.run(all_at_once(url)))
        return {
            "": f"{CLIENTS} clients",
            "queries": len(took),
            "p50, s": took[len(took) // 2],
            "p99, s": took[int(len(took) * 0.99)],
            "S3 requests a query": (sum(counts(s3)) - before) / len(took),
            "API's memory, MB": memory_mb(process.pid),
        }


def of_peers(s3: str, days: int, countries: int) -> list[Row]:
    """Read one range by the API without a cache, and a month of it by DuckDB. Extrapolate DuckDB to the range."""
    last = FIRST + dt.timedelta(days=days - 1)
    before = counts(s3)
    with api(s3, cache_bytes=0) as (url, process), httpx.Client(base_url=url, timeout=300) as http:
        began_s = time.perf_counter()
        response = http.get(f"/country-stats?from={FIRST}&to={last}")
        name = "the API without a cache" + (", which gave up" if response.status_code == 503 else "")
        rows = [peer_row(name, days, time.perf_counter() - began_s, counts_since(s3, before), memory_mb(process.pid))]
    try:
        import duckdb  # noqa: F401, PLC0415 - a peer that need not be there
    except ImportError:
        print("DuckDB is not installed: left out", file=sys.stderr)
        return rows
    before = counts(s3)
    began_s = time.perf_counter()
    month_days = min(days, MONTH_DAYS)
    call = f"read_with_duckdb({s3!r}, {month_days})"
    command = [sys.executable, "-c", f"from bench.reader import read_with_duckdb; {call}"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment()).stdout
    found, peak_mb = map(float, output.split())
    assert found == countries, "DuckDB found other countries"
    took_s, (lists, gets) = time.perf_counter() - began_s, counts_since(s3, before)
    months = days / month_days
    return [
        *rows,
        peer_row("DuckDB, after boto3", month_days, took_s, (lists, gets), peak_mb),
        peer_row("DuckDB, extrapolated", days, took_s * months, (round(lists * months), round(gets * months)), None),
    ]


def read_with_duckdb(s3: str, days: int) -> None:
    """Fetch every summary of the first days of a month, and let DuckDB make the statistics; print what was found."""
    import resource  # noqa: PLC0415 - in a process of its own, with what it alone needs

    import boto3  # noqa: PLC0415 - as above
    import duckdb  # noqa: PLC0415 - as above
    from botocore.config import Config  # noqa: PLC0415 - as above

    config = Config(max_pool_connections=GETS_AT_ONCE, s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1", config=config)
    last = str(FIRST + dt.timedelta(days=days - 1))
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bench", Prefix=f"{FOLDER}{FIRST:%Y-%m}")
    keys = [
        entry["Key"] for page in pages for entry in page.get("Contents", ()) if entry["Key"][len(FOLDER) :][:10] <= last
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(GETS_AT_ONCE) as threads:
        file = Path(folder) / "summaries.ndjson"
        with file.open("wb") as out:
            for body in threads.map(lambda key: client.get_object(Bucket="bench", Key=key)["Body"].read(), keys):
                out.write(body + b"\n")
        rows = duckdb.sql(
            "select country, date, totals.trips, totals.passengers, totals.accidents > 0, "
            "totals.delay_total_ms / nullif(totals.trips, 0) / 1000 "
            "from read_json($file, format = 'newline_delimited', columns = {country: 'VARCHAR', date: 'DATE', totals: "
            "'STRUCT(trips BIGINT, passengers BIGINT, accidents BIGINT, delay_total_ms BIGINT)'}) "
            "order by country, date",
            params={"file": str(file)},
        ).fetchall()
    print(len({row[0] for row in rows}), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


@contextmanager
def store(days: int, countries: int) -> Iterator[str]:
    """Run the S3 server; yield its URL."""
    port = free_port("the summaries of a benchmark")
    command = ["-m", "bench.summaries", "--port", port, "--first", FIRST, "--days", days, "--countries", countries]
    url = f"http://127.0.0.1:{port}"
    with process_of(list(map(str, command)), f"{url}/?count", environment()):
        yield url


@contextmanager
def api(s3: str, *, cache_bytes: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the API over the S3 server; yield its URL and its process."""
    port = free_port("the API of a benchmark")
    settings = {
        "TRIPFOLD_S3_ENDPOINT_URL": s3,
        "TRIPFOLD_S3_BUCKET": "bench",
        "TRIPFOLD_API_PORT": str(port),
        "TRIPFOLD_API_ACCESS": "open",
        "TRIPFOLD_API_SHUTDOWN_DELAY_S": "0",
        "TRIPFOLD_API_RANGE_DAYS_MAX": "4000",
        "TRIPFOLD_API_CACHE_BYTES": str(cache_bytes),
        "TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9",
        "TRIPFOLD_LOG_LEVEL": "error",
    }
    url = f"http://127.0.0.1:{port}"
    with process_of(["-m", "tripfold", "serve", "api"], f"{url}/health/live", environment() | settings) as process:
        yield url, process


@contextmanager
def process_of(arguments: list[str], ready_url: str, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python until the block ends; wait until its URL responds."""
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env))
        stack.callback(process.terminate)
        deadline_s = time.monotonic() + START_DEADLINE_S
        while not asyncio.run(http_probe(ready_url)()):
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"{arguments} did not start")
            time.sleep(0.1)
        yield process


def environment() -> dict[str, str]:
    """Return the variables of a process of this benchmark."""
    return {**os.environ, **CREDENTIALS, "AWS_DEFAULT_REGION": "us-east-1", "PYTHONPATH": str(ROOT)}


def persistently(
    http: httpx.Client, path: str, headers: dict[str, str] | None = None
) -> tuple[int, float, int, httpx.Response]:
    """Repeat a request while the API returns 503; return its tries, seconds, bytes and response."""
    began_s = time.perf_counter()
    for tries in range(1, TRIES_MAX + 1):
        with http.stream("GET", path, headers=headers) as response:
            body = b"".join(response.iter_raw())
        if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            took_s = time.perf_counter() - began_s
            decoded = httpx.Response(response.status_code, headers=response.headers, content=body)
            return tries, took_s, len(body), decoded
    sys.exit(f"{path} took too long {TRIES_MAX} times")


def counts(s3: str) -> tuple[int, int]:
    """Return how many listings and how many objects S3 has answered."""
    told = httpx.get(s3, params={"count": ""}, timeout=30).json()
    return told.get("list", 0), told.get("get", 0)


def memory_mb(pid: int) -> float:
    """Return the most memory that a process has taken."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0


def middle(rows: list[Row]) -> Row:
    """Return the row of the median time, with the highest time."""
    rows = sorted(rows, key=lambda row: row["p50, s"])
    return rows[len(rows) // 2] | {"max, s": rows[-1]["max, s"]} if rows else {}


def counts_since(s3: str, before: tuple[int, int]) -> tuple[int, int]:
    """Return how many listings and how many objects S3 has answered since then."""
    lists, gets = counts(s3)
    return lists - before[0], gets - before[1]


def peer_row(name: str, days: int, took_s: float, read: tuple[int, int], peak_mb: float | None) -> Row:
    """Return the row of a peer."""
    return {"": name, "days": days, "seconds": took_s, "S3 lists": read[0], "S3 gets": read[1], "memory, MB": peak_mb}


def rows_of(results: list[Row], columns: tuple[str, ...]) -> list[list[object]]:
    """Return the cells of a table: the name, then the columns."""
    return [[row[""], *(row[column] for column in columns)] for row in results]


if __name__ == "__main__":
    main()
