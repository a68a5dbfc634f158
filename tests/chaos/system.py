"""All of Tripfold as processes, with a faulty proxy for S3, a relay for Kafka, and an upstream that injects faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import httpx
import msgspec
from aiokafka.errors import KafkaError

from shared.kafka.admin import admin_client, apply_topics
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import PREFIX, load_settings
from tests import ROOT
from tests.apache_kafka import ApacheKafka, cluster
from tests.chaos.relay import HOST, Network, Relay
from tests.chaos.s3_proxy import FaultyS3
from tests.chaos.upstream import ChaosUpstream
from tests.upgrade.builds import newer_build
from tripfold.local.embedded import EmbeddedStack
from tripfold.local.long_poll import Relay as LongPoll
from tripfold.local.ports import free_port
from tripfold.local.supervisor import ChildEvent, ChildProcess, Supervisor, http_probe

PARTITIONS = 4
KILL_AFTER_S = 20.0

ARGUMENTS = {
    "api": ("serve", "api"),
    "planner": ("serve", "ingest", "--role", "planner"),
    "worker": ("serve", "ingest", "--role", "worker"),
    "aggregate": ("serve", "aggregate"),
}


class SystemConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of a system.

    The embedded broker allows one consumer in a group, so it needs ``services`` with one of each. ``clock_library`` is
    the path of libfaketime, without which clocks cannot be moved. ``upgrades`` allows services to change their build.
    """

    embedded_broker: bool = False
    brokers: int = 1
    clock_library: str | None = None
    upgrades: bool = False
    services: tuple[str, ...] = ("api", "planner", "worker-1", "worker-2", "aggregate-1", "aggregate-2")
    cities: int = 12
    dates: tuple[str, ...] = ("2024-05-01", "2024-05-02", "2024-05-03", "2024-05-04")
    large_files: bool = True
    seed: int = 0
    session_timeout_s: float = 8.0
    settings: tuple[tuple[str, str], ...] = ()
    static_members: bool = True


class System(msgspec.Struct, frozen=True, kw_only=True):
    """A running system.

    ``brokers`` is empty with the embedded broker. ``environment`` holds the settings of the services, which use the
    proxy and the relays. The supervisor calls ``listeners`` for every event of its processes.
    """

    config: SystemConfig
    supervisor: Supervisor
    brokers: tuple[ApacheKafka, ...]
    network: Network
    s3: FaultyS3
    store_url: str
    upstream: ChaosUpstream
    environment: dict[str, str]
    health_urls: dict[str, str]
    client: httpx.AsyncClient
    directory: Path
    listeners: list[Callable[[ChildEvent], None]]

    @property
    def api_url(self) -> str:
        """The URL of the API."""
        return self.health_urls["api"]

    @property
    def kafka_address(self) -> str:
        """The bootstrap address of Kafka."""
        return self.environment[f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS"]

    async def ready(self, name: str) -> bool:
        """Return whether a service reports that it is ready."""
        return await http_probe(f"{self.health_urls[name]}/health/ready")()

    async def all_ready(self) -> bool:
        """Return whether every service reports that it is ready."""
        return all(await asyncio.gather(*(self.ready(name) for name in self.config.services)))

    async def restart_kafka(
        self, pause_s: float, *, kill: bool, brokers: Sequence[ApacheKafka] = (), lose_data: bool = False
    ) -> None:
        """Stop or kill some brokers or all, wait, and start them again, with their data or without."""
        if not self.brokers:
            self.supervisor.kill("broker", signal.SIGTERM)  # the supervisor restarts it
            return
        brokers = brokers or self.brokers
        await asyncio.gather(*(asyncio.to_thread(broker.kill if kill else broker.stop) for broker in brokers))
        for broker in brokers if lose_data else ():
            await asyncio.to_thread(broker.lose_data)
        await asyncio.sleep(pause_s)
        await asyncio.gather(*(asyncio.to_thread(broker.start) for broker in brokers))

    async def in_sync(self) -> bool:
        """Return whether all replicas of all topics are in sync; False while Kafka cannot say."""
        with contextlib.suppress(KafkaError, OSError, DependencyUnavailable):
            async with admin_client(load_settings(self.environment)) as client:
                topics = await client.describe_topics()
            return all(len(one["isr"]) == len(one["replicas"]) for topic in topics for one in topic["partitions"])
        return False

    async def move_clock(self, name: str, seconds: float) -> None:
        """Let the clock of a service differ from the clock of this machine from now on."""
        moved = self.clock(name).with_suffix(".new")
        moved.write_text(f"{seconds:+.0f}")
        moved.replace(self.clock(name))

    def clock(self, name: str) -> Path:
        """Return the file that moves the clock of a service."""
        return self.directory / "clocks" / name

    def change_build(self, name: str) -> bool:
        """Let a service start from the other build next time; return whether that is the next one."""
        build, new = self.build(name), self.build(f"{name}.new")
        upgraded = build.readlink() == ROOT
        new.symlink_to(self.directory / "next" if upgraded else ROOT)
        new.replace(build)
        return upgraded

    def build(self, name: str) -> Path:
        """Return the link to the build of a service."""
        return self.directory / "builds" / name

    async def command(self, *arguments: str, deadline_s: float = 300.0) -> tuple[int, str]:
        """Run a ``tripfold`` command, bypassing the S3 proxy; return its exit code and its output."""
        direct = {f"{PREFIX}S3_ENDPOINT_URL": self.store_url, f"{PREFIX}API_URL": self.api_url}
        return await run(sys.executable, "-m", "tripfold", *arguments, env=self.environment | direct, s=deadline_s)

    async def oracle(
        self, *dates: str, truth: bool, kafka: bool = True, tables: bool = False, deadline_s: float = 300.0
    ) -> tuple[int, str]:
        """Run the oracle for ``dates``, or for all dates; return its exit code and its output.

        The oracle is a program that checks stored and served data, and shares no code with Tripfold.
        """
        program = str(Path(__file__).with_name("oracle.py"))
        arguments = ["--s3", self.store_url, "--bucket", self.environment[f"{PREFIX}S3_BUCKET"]]
        arguments += ["--api", self.api_url, "--upstream", self.upstream.url]
        if kafka:
            arguments += ["--kafka", self.kafka_address, "--prefix", self.environment[f"{PREFIX}TOPIC_PREFIX"]]
        arguments += [*(["--tables"] if tables else []), *(["--truth"] if truth else [])]
        arguments += ["--dates", *dates] if dates else []
        environment = {**self.environment, "AWS_DEFAULT_REGION": "us-east-1"}
        return await run(sys.executable, program, *arguments, env=environment, s=deadline_s)


async def run(*command: str, env: dict[str, str], s: float) -> tuple[int, str]:
    """Run a program; return its exit code and its output. Kills it and raises TimeoutError after ``s`` seconds."""
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(s):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode() or errors.decode()


@contextlib.asynccontextmanager
async def running_system(config: SystemConfig, directory: Path) -> AsyncIterator[System]:
    """Run everything except the services, which ``start_services`` starts; stop all processes at the end."""
    listeners: list[Callable[[ChildEvent], None]] = []

    def on_event(event: ChildEvent) -> None:
        for listener in listeners:
            listener(event)

    async with contextlib.AsyncExitStack() as stack:
        embedded = stack.enter_context(contextlib.closing(EmbeddedStack(directory / "data")))
        supervisor = await stack.enter_async_context(Supervisor(on_event=on_event, held_fds=embedded.held_fds))
        brokers: tuple[ApacheKafka, ...] = ()
        if config.embedded_broker:
            own_port = embedded.ports["broker"]
            # This relay replaces the broker's address in its responses by its own.
            network = Network([await stack.enter_async_context(_embedded_network(own_port))])
            await supervisor.start(embedded.s3, embedded.broker)
        else:
            relays = [await stack.enter_async_context(Relay(0)) for _ in range(config.brokers)]
            brokers = cluster(directory / "kafka", advertised_ports=[relay.port for relay in relays])
            for relay, broker in zip(relays, brokers, strict=True):
                relay.target_port = broker.port
                stack.callback(broker.stop)
            network = Network(relays)
            starting = [asyncio.to_thread(broker.start) for broker in brokers]
            await asyncio.gather(supervisor.start(embedded.s3), *starting)
        store_port = int(embedded.endpoints.s3_endpoint_url.rpartition(":")[2])
        proxy = await stack.enter_async_context(FaultyS3(store_port, seed=config.seed))
        upstream = await stack.enter_async_context(
            ChaosUpstream(
                cities=config.cities, dates=list(config.dates), seed=config.seed, large_files=config.large_files
            )
        )
        ports = {name: free_port(name) for name in config.services}
        environment = {
            **os.environ,
            **embedded.endpoints.environment(),
            f"{PREFIX}S3_ENDPOINT_URL": proxy.url,
            f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS": network.address,
            f"{PREFIX}KAFKA_PARTITIONS": str(PARTITIONS),
            f"{PREFIX}TOPIC_PREFIX": "chaos.",
            f"{PREFIX}UPSTREAM_URL": upstream.url,
            f"{PREFIX}UPSTREAM_REQUESTS_PER_S": "200",
            f"{PREFIX}KAFKA_SESSION_TIMEOUT_S": str(config.session_timeout_s),
            f"{PREFIX}RETRY_WAIT_MAX_S": "2",
            f"{PREFIX}UPSTREAM_READ_TIMEOUT_S": "3",
            f"{PREFIX}STALLED_REQUEST_AFTER_S": "20",
            f"{PREFIX}PROGRESS_INTERVAL_S": "0.2",
            f"{PREFIX}API_ACCESS": "open",
            f"{PREFIX}API_SHUTDOWN_DELAY_S": "0",
            f"{PREFIX}API_REQUESTS_PER_MINUTE": "100000",
            f"{PREFIX}LOG_FORMAT": "text",
            **{f"{PREFIX}{name}": value for name, value in config.settings},
        }
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=15, trust_env=False))
        stack.push_async_callback(supervisor.stop)  # stop the services before their dependencies
        yield System(
            config=config,
            supervisor=supervisor,
            brokers=brokers,
            network=network,
            s3=proxy,
            store_url=embedded.endpoints.s3_endpoint_url,
            upstream=upstream,
            environment=environment,
            health_urls={name: f"http://{HOST}:{port}" for name, port in ports.items()},
            client=client,
            directory=directory,
            listeners=listeners,
        )


@contextlib.asynccontextmanager
async def _embedded_network(broker_own_port: int) -> AsyncIterator[Relay]:
    relay = Relay(broker_own_port)
    relay.serve = LongPoll(HOST, relay.port, broker_own_port).relay
    async with relay:
        yield relay


def service(system: System, name: str, **settings: str) -> ChildProcess:
    """Return a service as a child process that counts as started once it is live, ready or not."""
    kind = name.partition("-")[0]
    port = system.health_urls[name].rpartition(":")[2]
    own = {
        f"{PREFIX}API_PORT" if kind == "api" else f"{PREFIX}HEALTH_PORT": port,
        **({f"{PREFIX}KAFKA_GROUP_INSTANCE_ID": name} if system.config.static_members else {}),
        **_clock_of(system, name),
        **{f"{PREFIX}{setting}": value for setting, value in settings.items()},
    }
    return ChildProcess(
        name=name,
        argv=(sys.executable, "-m", "tripfold", *ARGUMENTS[kind]),
        env=system.environment | own,
        log_path=system.directory / "logs" / f"{name}.log",
        ready=http_probe(f"{system.health_urls[name]}/health/live"),
        ready_deadline_s=180,
        cwd=system.build(name) if system.config.upgrades else None,
    )


def _clock_of(system: System, name: str) -> dict[str, str]:
    """Return the variables with which libfaketime adds the seconds in a file to the clock of a service."""
    if system.config.clock_library is None:
        return {}
    return {
        "LD_PRELOAD": system.config.clock_library,
        "FAKETIME_TIMESTAMP_FILE": str(system.clock(name)),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


async def start_services(system: System, *, provision: bool = True) -> None:
    """Create the topics, and start every service of the configuration."""
    if provision:
        await apply_topics(load_settings(system.environment))
    if system.config.clock_library is not None:
        system.clock("").mkdir()
        for name in system.config.services:
            await system.move_clock(name, 0)
    if system.config.upgrades:
        newer_build(system.directory / "next")
        system.build("").mkdir()
        for name in system.config.services:
            system.build(name).symlink_to(ROOT)
    await system.supervisor.start(*(service(system, name) for name in system.config.services))


class CounterTotals:
    """Sums the services' counters across their restarts."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._last: dict[str, dict[str, float]] = {}

    async def sample(self, system: System) -> None:
        """Read the counters of every service that responds."""
        await asyncio.gather(*(self._sample(system, name) for name in system.config.services))

    async def _sample(self, system: System, name: str) -> None:
        try:
            response = await system.client.get(f"{system.health_urls[name]}/metrics", timeout=4)
        except httpx.HTTPError:
            return
        found = {}
        for line in response.text.splitlines():
            if line.startswith("tripfold_") and "_total" in line:
                counter, _, value = line.rpartition(" ")
                found[counter] = float(value)
        last = self._last.get(name, {})
        for counter, now in found.items():
            before = last.get(counter, 0.0)
            # A lower value means that the service restarted.
            self.totals[counter.partition("{")[0]] += int(now - before if now >= before else now)
        self._last[name] = found
