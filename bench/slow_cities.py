"""Measure how cities with errors delay the others. Run it as `python -m bench.slow_cities`.

An upstream returns 503 after a second for five of fifty cities, and a small file at once for the others. A real worker
takes all fifty tasks from the embedded Kafka and writes to SeaweedFS. The benchmark measures how long the 45 good
cities take: alone, and among all fifty. It does so with twelve partitions, and with all tasks in one.

Bias: upstream, worker, broker and store share the machine's cores, so the good cities take longer alone than they
would elsewhere. The upstream sets the time of the bad cities. There is no limit on requests a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import msgspec

from bench.context import end_in_order, seaweedfs
from bench.tables import print_table
from bench.worker import DATE, running_worker, task_of
from shared.domain import keys
from shared.domain.ids import CityId
from shared.kafka.admin import apply_topics
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.settings import load_settings
from shared.storage.s3 import S3Store

CITIES: Final = 50
BAD_CITIES: Final = frozenset(random.Random(1).sample(range(CITIES), 5))
GOOD_CITIES: Final = CITIES - len(BAD_CITIES)
BAD_AFTER_S: Final = 1.0
LOOK_INTERVAL_S: Final = 0.02
DEADLINE_S: Final = 120.0
FILE: Final = json.dumps(
    [
        {"departure-time": f"{DATE}T12:00:00", "bus-type": "BUS-1", "passengers": n, "delay": "PT5S", "accident": False}
        for n in range(200)
    ]
).encode()


class Measured(msgspec.Struct, frozen=True):
    """How long the good cities took, in seconds: by themselves, and beside the bad ones."""

    partitions: int
    alone_s: float
    beside_s: float

    @property
    def ratio(self) -> float:
        """How many times longer they took."""
        return self.beside_s / self.alone_s


class _Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        bad = int(self.path.split("/")[2]) in BAD_CITIES
        if bad:
            time.sleep(BAD_AFTER_S)
        body = b"" if bad else FILE
        self.send_response(503 if bad else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the worker has ended
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Measure how cities with errors delay the others.")
    parser.add_argument("--runs", type=int, default=3, help="runs; the median counts")
    parser.add_argument("--quick", action="store_true", help="one run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    end_in_order()
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), _Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder, seaweedfs(Path(folder)) as services:
        environment = {
            **os.environ,
            **services.environment,
            "TRIPFOLD_UPSTREAM_URL": f"http://127.0.0.1:{upstream.server_port}",
            "TRIPFOLD_UPSTREAM_REQUESTS_PER_S": "1000",
            "TRIPFOLD_LOG_LEVEL": "warning",
        }
        found = [_median(environment, partitions, 1 if options.quick else options.runs) for partitions in (12, 1)]
    print_table(
        f"{GOOD_CITIES} good cities, by themselves and beside {len(BAD_CITIES)} that return 503",
        ("partitions", "by themselves, s", "beside, s", "ratio"),
        [(str(one.partitions), one.alone_s, one.beside_s, one.ratio) for one in found],
    )
    if options.json:
        options.json.write_text(json.dumps(msgspec.to_builtins(found), indent=2) + "\n")


def _median(environment: dict[str, str], partitions: int, runs: int) -> Measured:
    good = [number for number in range(CITIES) if number not in BAD_CITIES]
    alone, beside = [], []
    for _ in range(runs):
        alone.append(asyncio.run(_measure(environment, partitions, good)))
        beside.append(asyncio.run(_measure(environment, partitions, range(CITIES))))
    return Measured(partitions, statistics.median(alone), statistics.median(beside))


async def _measure(environment: dict[str, str], partitions: int, cities: range | list[int]) -> float:
    """Return in how many seconds a worker has stored all good cities of the requested ones."""
    name = uuid.uuid4().hex
    own = {
        **environment,
        "TRIPFOLD_S3_BUCKET": name,
        "TRIPFOLD_TOPIC_PREFIX": f"{name}.",
        "TRIPFOLD_KAFKA_PARTITIONS": str(partitions),
    }
    os.environ.update({name: value for name, value in own.items() if name.startswith("AWS_")})
    settings = load_settings(own)
    await apply_topics(settings)
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(S3Store(settings))
        await store.create_bucket()
        publisher = await stack.enter_async_context(KafkaPublisher(settings, source="bench"))
        await stack.enter_async_context(running_worker(own, 0))
        began_s = time.perf_counter()
        await publisher.publish([OutgoingEvent(task_of(CityId(str(city)), city)) for city in cities])
        async with asyncio.timeout(DEADLINE_S):
            while len([one async for one in store.list(keys.manifests_of(DATE))]) < GOOD_CITIES:  # noqa: ASYNC110 - a bucket has no event to wait for
                await asyncio.sleep(LOOK_INTERVAL_S)
        return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
