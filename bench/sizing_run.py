"""Runs a whole deployment on Apache Kafka for `bench.sizing`, and measures what a date costs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bench.context import ROOT, cpu_s, null_store, peak_rss_bytes, served
from bench.sizing import Load
from bench.upstream import city_id, write_block
from shared.domain.topics import TOPICS
from tests.apache_kafka import ApacheKafka, apache_kafka, reason_unavailable
from tripfold.local.ports import free_port
from tripfold.local.supervisor import http_probe

READY_DEADLINE_S: Final = 120.0
DONE_DEADLINE_S: Final = 600.0
END_DEADLINE_S: Final = 30.0
LOOK_INTERVAL_S: Final = 0.1
COMMAND_TRIES: Final = 5
FIRST_CITY: Final = city_id(blocks=1, number=0)
COMPACTED: Final = frozenset({"city-stats", "country-day-summaries"})
READS: Final = frozenset({"GetObject", "HeadObject"})
WRITES: Final = frozenset({"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"})


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one date. Processor time is in seconds, by kind of process."""

    wall_s: float
    cpu_s: dict[str, float]
    others_cores: float
    """Cores that programs outside the benchmark used."""
    peak_mb: dict[str, float]
    s3_calls: dict[str, int]
    kafka_bytes: dict[str, int]

    @property
    def worker_mb(self) -> float:
        """The peak memory of the largest worker."""
        return max(size_mb for name, size_mb in self.peak_mb.items() if name.startswith("worker"))

    @property
    def s3_reads(self) -> int:
        """Reads of objects, without those of the API."""
        return sum(self.s3_calls.get(operation, 0) for operation in READS)

    @property
    def s3_writes(self) -> int:
        """Writes of objects and of parts."""
        return sum(self.s3_calls.get(operation, 0) for operation in WRITES)

    @property
    def expiring_bytes(self) -> int:
        """Bytes in the topics that expire."""
        return sum(size for name, size in self.kafka_bytes.items() if name not in COMPACTED)

    @property
    def compacted_bytes(self) -> int:
        """Bytes in the compacted topics, before compaction."""
        return sum(size for name, size in self.kafka_bytes.items() if name in COMPACTED)


class Servers(msgspec.Struct, frozen=True, kw_only=True):
    """The servers that all runs share."""

    environment: dict[str, str]
    kafka: ApacheKafka
    pids: dict[str, int]


@contextlib.contextmanager
def servers() -> Iterator[Servers]:
    """Run Apache Kafka and the sink. Exits with the reason where Apache Kafka cannot run."""
    if reason := reason_unavailable():
        sys.exit(f"this benchmark measures on Apache Kafka, which does not run here: {reason}")
    with tempfile.TemporaryDirectory() as folder, null_store() as sink, apache_kafka(Path(folder)) as kafka:
        environment = {
            **os.environ,
            **sink.environment,
            "TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": kafka.address,
            "TRIPFOLD_LOG_LEVEL": "warning",
            "TRIPFOLD_API_ACCESS": "open",
            "TRIPFOLD_UPSTREAM_REQUESTS_PER_S": "1000",
        }
        pids = {"store": sink.pid, "kafka": int((kafka.data_dir / "kafka.pid").read_text())}
        yield Servers(environment=environment, kafka=kafka, pids=pids)


@contextlib.contextmanager
def upstream_of(running: Servers, load: Load, *, date: str, large: int = 0) -> Iterator[tuple[dict[str, str], int]]:
    """Serve the files of a load; yield the environment of a new bucket and new topics, and the upstream's pid.

    ``large`` more cities have files that are a hundred times as large.
    """
    with tempfile.TemporaryDirectory() as folder:
        block = Path(folder) / "block.json"
        write_block(block, date=date, size_bytes=round(load.megabytes * 1e6))
        arguments = ("--block", str(block), "--cities", str(load.cities), "--large", str(large))
        with served("upstream", *arguments) as (url, pid):
            environment = {
                **running.environment,
                "TRIPFOLD_UPSTREAM_URL": url,
                "TRIPFOLD_S3_BUCKET": uuid.uuid4().hex,
                "TRIPFOLD_TOPIC_PREFIX": f"{uuid.uuid4().hex}.",
                "TRIPFOLD_KAFKA_PARTITIONS": str(load.partitions),
            }
            yield environment, pid


@contextlib.asynccontextmanager
async def running_deployment(environment: dict[str, str], workers: int) -> AsyncIterator[dict[str, tuple[int, str]]]:
    """Make bucket and topics, and run all processes; yield the pid and the URL of each, by name."""
    for command in (("bucket", "apply"), ("topics", "apply")):
        await run_command(command, environment)
    commands = {
        "api": ("serve", "api"),
        "planner": ("serve", "ingest", "--role", "planner"),
        "aggregate": ("serve", "aggregate"),
        **{f"worker-{number}": ("serve", "ingest", "--role", "worker") for number in range(workers)},
    }
    async with contextlib.AsyncExitStack() as stack:
        started = await asyncio.gather(
            *(stack.enter_async_context(running_process(command, environment)) for command in commands.values())
        )
        yield dict(zip(commands, started, strict=True))


def measure(running: Servers, load: Load, *, date: str) -> Measured:
    """Process one date with new topics, a new bucket and new processes; return what it cost."""
    with upstream_of(running, load, date=date) as (environment, pid):
        pids = {**running.pids, "upstream": pid}
        return asyncio.run(_measure(running, environment, workers=load.workers, pids=pids, date=date))


async def _measure(
    running: Servers, environment: dict[str, str], *, workers: int, pids: dict[str, int], date: str
) -> Measured:
    async with httpx.AsyncClient(trust_env=False) as client, running_deployment(environment, workers) as processes:
        api_url = processes["api"][1]
        pids = pids | {name: pid for name, (pid, _) in processes.items()}
        cpu_before = {name: cpu_s(pid) for name, pid in pids.items()}
        calls_before = await _s3_calls(client, environment, api_url)
        machine_before = _machine_cpu_s()
        began_s = time.perf_counter()
        await process_date(client, api_url, date)
        wall_s = time.perf_counter() - began_s
        machine_s = _machine_cpu_s() - machine_before
        used = {name: cpu_s(pid) - cpu_before[name] for name, pid in pids.items()}
        calls = await _s3_calls(client, environment, api_url)
        prefix = environment["TRIPFOLD_TOPIC_PREFIX"]
        return Measured(
            wall_s=wall_s,
            cpu_s=_by_kind(used),
            others_cores=(machine_s - sum(used.values())) / wall_s,
            peak_mb={name: peak_rss_bytes(pid) / 1e6 for name, (pid, _) in processes.items()},
            s3_calls=dict(calls - calls_before),
            kafka_bytes={
                spec.topic.value: sum(
                    log.stat().st_size for log in running.kafka.data_dir.glob(f"**/{spec.name(prefix)}-*/*.log")
                )
                for spec in TOPICS
            },
        )


async def run_command(command: tuple[str, ...], environment: dict[str, str]) -> None:
    """Run a command of Tripfold until it succeeds: on a busy machine the broker needs some time to list new topics."""
    for _ in range(COMMAND_TRIES):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tripfold", *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.DEVNULL
        )
        if await process.wait() == 0:
            return
    raise RuntimeError(f"tripfold {' '.join(command)} failed {COMMAND_TRIES} times")


def _by_kind(used: dict[str, float]) -> dict[str, float]:
    """Add up the processor time of all workers."""
    found: Counter[str] = Counter()
    for name, time_s in used.items():
        found[name.partition("-")[0]] += time_s  # type: ignore[assignment] # a Counter of seconds
    return dict(found)


@contextlib.asynccontextmanager
async def running_process(command: tuple[str, ...], environment: dict[str, str]) -> AsyncIterator[tuple[int, str]]:
    """Run a process; yield its id, and the URL of its health once it is ready."""
    port = free_port("a process")
    own = {"TRIPFOLD_HEALTH_PORT": str(port), "TRIPFOLD_API_PORT": str(port), "TRIPFOLD_API_SHUTDOWN_DELAY_S": "0"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tripfold", *command, cwd=ROOT, env={**environment, **own}
    )
    url = f"http://127.0.0.1:{port}"
    ready = http_probe(f"{url}/health/ready")
    try:
        async with asyncio.timeout(READY_DEADLINE_S):
            while not await ready():  # noqa: ASYNC110 - another process has no event to wait for
                await asyncio.sleep(LOOK_INTERVAL_S)
        yield process.pid, url
    finally:
        with contextlib.suppress(ProcessLookupError):  # Ctrl-C ends it too
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_DEADLINE_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def process_date(client: httpx.AsyncClient, api_url: str, date: str) -> None:
    """Request a date, and wait until it is completed."""
    requested = await client.post(f"{api_url}/process-request", params={"date": date})
    requested.raise_for_status()
    async with asyncio.timeout(DONE_DEADLINE_S):
        while True:
            state = (await client.get(api_url + requested.headers["location"])).json()
            if state["status"] not in {"accepted", "planned", "running"}:
                break
            await asyncio.sleep(LOOK_INTERVAL_S)
    assert state["status"] == "completed", state


async def _s3_calls(client: httpx.AsyncClient, environment: dict[str, str], api_url: str) -> Counter[str]:
    """Return the requests to the sink by operation, without those of the API, which only this benchmark asks often."""
    calls = Counter((await client.get(f"{environment['TRIPFOLD_S3_ENDPOINT_URL']}/?calls")).json())
    for family in text_string_to_metric_families((await client.get(f"{api_url}/metrics")).text):
        for sample in family.samples:
            if sample.name == "tripfold_s3_request_seconds_count":
                calls[sample.labels["operation"]] -= int(sample.value)
    return calls


def _machine_cpu_s() -> float:
    """Return the processor time that the whole machine has used."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
