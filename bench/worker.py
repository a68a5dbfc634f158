"""Measures workers: memory by file size and streams, and the gain of a second one. Run it as `python -m bench.worker`.

Real workers (`tripfold serve ingest --role worker`) take tasks from the embedded Kafka, files from the upstream, and
write them to the sink of `bench.null_s3`, for a file of 4 GB should not fill a disk. Memory is the peak of the whole
process (VmHWM), with Python, the Kafka client and all other libraries in it. `held` is the process's own metric,
`tripfold_event_loop_lag_max_seconds`; on a machine with other work it includes the waiting for a core.

Bias: workers, upstream, sink and broker share the machine's cores. On two cores one worker, its upstream and its sink
are busy already, so a second worker has little left to show.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import httpx
import msgspec

from bench.context import ROOT, end_in_order, null_store, peak_rss_bytes, seaweedfs, served
from bench.tables import print_table
from bench.upstream import BLOCK_BYTES, Sums, city_id, write_block
from shared.domain import keys, objects
from shared.domain.events import IngestCity
from shared.domain.ids import CityId, CountrySlug, mint_request_id, utc_now
from shared.domain.objects import Manifest
from shared.kafka.admin import apply_topics
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.settings import Settings, load_settings
from shared.storage.s3 import S3Store
from tripfold.local.ports import free_port
from tripfold.local.supervisor import http_probe

DATE: Final = dt.date(2024, 5, 1)
READY_DEADLINE_S: Final = 60.0
DONE_WITHIN_S: Final = 60.0
BYTES_PER_S_MIN: Final = 4e6
"""A load that takes longer than this allows is given up: two workers can block each other on the embedded Kafka."""

LOOK_INTERVAL_S: Final = 0.02
END_DEADLINE_S: Final = 20.0
PARTITIONS: Final = 8
STREAMS: Final = (1, 2, 4, 8)
_LAG_MAX: Final = re.compile(r"^tripfold_event_loop_lag_max_seconds (\S+)", re.MULTILINE)


class Load(msgspec.Struct, frozen=True):
    """The load of the workers: so many cities, each with a file of so many blocks."""

    workers: int
    streams: int
    cities: int
    blocks: int


class Measured(msgspec.Struct, frozen=True):
    """How it went: the worst of several workers in memory and in lag."""

    load: Load
    size_bytes: int
    wall_s: float
    idle_rss_mb: float
    peak_rss_mb: float
    held_ms: float
    s3_calls: dict[str, int]


def main() -> None:
    """Run the workers and print the tables."""
    parser = argparse.ArgumentParser(description="Measure worker processes.")
    parser.add_argument("--bytes", type=float, help="the largest file; default: 4e9, with --quick 3e8")
    parser.add_argument("--runs", type=int, default=1, help="how often one worker is compared with two")
    parser.add_argument("--quick", action="store_true", help="smaller files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    end_in_order()
    largest = max(3, round((options.bytes or (3e8 if options.quick else 4e9)) / BLOCK_BYTES))
    sizes = sorted({min(3, largest), max(3, largest // 4), largest})
    with tempfile.TemporaryDirectory() as folder:
        block = Path(folder) / "block.json"
        bench = _Bench(write_block(block, date=DATE.isoformat()))
        with (
            served("upstream", "--block", str(block)) as (upstream_url, _pid),
            seaweedfs(Path(folder) / "embedded") as kafka,
            null_store() as sink,
        ):
            bench.environment = {
                **os.environ,
                **kafka.environment,
                **sink.environment,
                "TRIPFOLD_UPSTREAM_URL": upstream_url,
                "TRIPFOLD_KAFKA_PARTITIONS": str(PARTITIONS),
                "TRIPFOLD_LOG_LEVEL": "warning",
            }
            by_size = [bench.measure(Load(workers=1, streams=1, cities=1, blocks=blocks)) for blocks in sizes]
            _print_by_size(by_size)
            each = max(1, largest // 16)
            by_streams = [bench.measure(Load(workers=1, streams=n, cities=n, blocks=each)) for n in STREAMS]
            _print_by_streams(by_streams)
            by_workers = []
            for workers in (1, 2) * options.runs:
                try:
                    load = Load(workers=workers, streams=2, cities=8, blocks=max(1, each // 4))
                    by_workers.append(bench.measure(load))
                except TimeoutError:
                    print(f"{workers} workers: left out, they did not come to an end", file=sys.stderr)
            _print_by_workers(by_workers)
    if options.json:
        found = {"by_size": by_size, "by_streams": by_streams, "by_workers": by_workers}
        options.json.write_text(json.dumps(msgspec.to_builtins(found), indent=2) + "\n")


class _Bench:
    """Starts workers on topics and a bucket of their own, gives them a load, and waits for its end."""

    def __init__(self, sums: Sums) -> None:
        self._sums = sums
        self.environment: dict[str, str] = {}

    def measure(self, load: Load) -> Measured:
        """Let workers take a load. Raises AssertionError if a city does not add up."""
        return asyncio.run(self._measure(load))

    async def _measure(self, load: Load) -> Measured:
        name = uuid.uuid4().hex
        environment = {
            **self.environment,
            "TRIPFOLD_S3_BUCKET": name,
            "TRIPFOLD_TOPIC_PREFIX": f"{name}.",
            "TRIPFOLD_INGEST_STREAMS": str(load.streams),
            "TRIPFOLD_UPSTREAM_CONCURRENCY_MAX": str(load.streams),
        }
        os.environ.update({name: value for name, value in environment.items() if name.startswith("AWS_")})
        settings = load_settings(environment)
        await apply_topics(settings)
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
            store = await stack.enter_async_context(S3Store(settings))
            publisher = await stack.enter_async_context(KafkaPublisher(settings, source="bench"))
            workers = [
                await stack.enter_async_context(running_worker(environment, number)) for number in range(load.workers)
            ]
            idle = max(peak_rss_bytes(process.pid) for process, _ in workers)
            before = await _calls(client, settings)
            cities = [CityId(str(city_id(blocks=load.blocks, number=number))) for number in range(load.cities)]
            began_s = time.perf_counter()
            await publisher.publish([OutgoingEvent(task_of(city, position)) for position, city in enumerate(cities)])
            async with asyncio.timeout(DONE_WITHIN_S + load.cities * load.blocks * BLOCK_BYTES / BYTES_PER_S_MIN):
                manifests = [await _manifest(store, city) for city in cities]
            wall_s = time.perf_counter() - began_s
            after = await _calls(client, settings)
            for manifest in manifests:
                found = manifest.contribution
                sums = Sums(found.trips, found.passengers, found.accidents, found.delay_total_ms)
                assert sums == self._sums.times(load.blocks), f"city {manifest.city_id}: {sums}"
            return Measured(
                load=load,
                size_bytes=sum(manifest.size_bytes for manifest in manifests),
                wall_s=wall_s,
                idle_rss_mb=idle / 1e6,
                peak_rss_mb=max(peak_rss_bytes(process.pid) for process, _ in workers) / 1e6,
                held_ms=1000 * max([await _held_s(client, url) for _, url in workers]),
                s3_calls={call: count - before.get(call, 0) for call, count in after.items()},
            )


@contextlib.asynccontextmanager
async def running_worker(
    environment: dict[str, str], number: int
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run a worker; yield its process, and where its health is, once it is ready."""
    port = free_port("a worker's health")
    own = {"TRIPFOLD_HEALTH_PORT": str(port), "TRIPFOLD_KAFKA_GROUP_INSTANCE_ID": f"bench-{number}"}
    command = (sys.executable, "-m", "tripfold", "serve", "ingest", "--role", "worker")
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env={**environment, **own})
    url = f"http://127.0.0.1:{port}"
    ready = http_probe(f"{url}/health/ready")
    try:
        async with asyncio.timeout(READY_DEADLINE_S):
            while not await ready():  # noqa: ASYNC110 - another process has no event to wait for
                await asyncio.sleep(LOOK_INTERVAL_S)
        yield process, url
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_DEADLINE_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _held_s(client: httpx.AsyncClient, url: str) -> float:
    found = _LAG_MAX.search((await client.get(f"{url}/metrics")).text)
    assert found is not None, "the worker has no metric of its event loop's lag"
    return float(found[1])


async def _calls(client: httpx.AsyncClient, settings: Settings) -> dict[str, int]:
    return dict((await client.get(f"{settings.s3_endpoint_url}/?calls")).json())


async def _manifest(store: S3Store, city: CityId) -> Manifest:
    key = keys.manifest(DATE, city)
    while (found := await store.get(key)) is None:  # noqa: ASYNC110 - as above
        await asyncio.sleep(LOOK_INTERVAL_S)
    return objects.decode(Manifest, found.body, key)


def task_of(city: CityId, position: int) -> IngestCity:
    """Return the task of a city."""
    return IngestCity(
        request_id=mint_request_id(utc_now()),
        date=DATE,
        city_id=city,
        upstream_id=str(city),
        city_name=f"City {city}",
        country=CountrySlug("armenia"),
        country_name="Armenia",
        plan_revision=1,
        position=position,
    )


def _print_by_size(by_size: list[Measured]) -> None:
    print_table(
        "A worker's memory by the size of its file, one stream",
        ("file, MB", "peak RSS, MB", "before it began, MB", "MB/s", "held, ms"),
        [
            (
                str(round(one.size_bytes / 1e6)),
                *map(round, (one.peak_rss_mb, one.idle_rss_mb, _speed(one), one.held_ms)),
            )
            for one in by_size
        ],
    )


def _print_by_streams(by_streams: list[Measured]) -> None:
    print_table(
        "A worker's memory by its streams",
        ("streams", "peak RSS, MB", "MB more than one stream, each", "MB/s in all", "held, ms"),
        [
            (
                str(one.load.streams),
                round(one.peak_rss_mb),
                (one.peak_rss_mb - by_streams[0].peak_rss_mb) / (one.load.streams - 1)
                if one.load.streams > 1
                else None,
                round(_speed(one)),
                round(one.held_ms),
            )
            for one in by_streams
        ],
    )


def _print_by_workers(by_workers: list[Measured]) -> None:
    print_table(
        "Workers on one topic, two streams each",
        ("workers", "MB/s in all", "peak RSS of the larger, MB"),
        [(str(one.load.workers), round(_speed(one)), round(one.peak_rss_mb)) for one in by_workers],
    )


def _speed(measured: Measured) -> float:
    return measured.size_bytes / 1e6 / measured.wall_s


if __name__ == "__main__":
    main()
