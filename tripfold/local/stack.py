"""Runs all of Tripfold on one machine: S3, Kafka, the reference upstream and the services."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from shared.kafka.admin import apply_topics
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import PREFIX, Settings, load_settings
from shared.storage.generation_pointer import provision_pointer, trust_change_counters
from shared.storage.s3 import S3Store
from shared.storage.schema_switch import provision_schema_switch
from tripfold.local.embedded import EmbeddedStack, Endpoints, write_private
from tripfold.local.ports import free_port
from tripfold.local.recovery import BrokerState, Recovered, recover
from tripfold.local.supervisor import ChildEvent, ChildProcess, Supervisor, http_probe

LOOPBACK = "127.0.0.1"
PARTITIONS = 4
TABLES_INTERVAL_S = 5
SERVICES = {
    "planner": ("serve", "ingest", "--role", "planner"),
    "worker": ("serve", "ingest", "--role", "worker"),
    "aggregate": ("serve", "aggregate"),
}
UPSTREAM_PORT_PREFERRED = 8090
TRIES_MAX = 10
TRY_WAIT_S = 0.5

_Result = TypeVar("_Result")


class StackOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a local stack. If ``upstream_url`` is None, it runs the reference upstream."""

    data_dir: Path
    host: str = LOOPBACK
    port: int = 8080
    upstream_url: str | None = None
    upstream_arguments: tuple[str, ...] = ()


class RunningStack(msgspec.Struct, frozen=True, kw_only=True):
    """A stack that is ready, and its addresses."""

    api_url: str
    upstream_url: str
    endpoints: Endpoints
    variables_file: Path
    environment: Mapping[str, str]
    metrics_urls: Mapping[str, str]
    """Where each process exports its metrics."""
    supervisor: Supervisor
    recovered: Recovered | None
    """The events that were published again, if the last stop was not clean."""


@contextlib.asynccontextmanager
async def local_stack(
    options: StackOptions, *, on_event: Callable[[ChildEvent], None], handle_signals: bool = True
) -> AsyncIterator[RunningStack]:
    """Run a stack while the context is open. Its parts start in the order in which they need each other.

    Raises OperatorError if a port is taken, the data directory is in use, or a part fails for good. Raises
    StopRequested on SIGINT and SIGTERM.
    """
    api_port = free_port("the API", fixed=options.port)
    with contextlib.ExitStack() as ended:
        embedded = ended.enter_context(contextlib.closing(EmbeddedStack(options.data_dir)))
        data_dir = embedded.data_dir
        logs_dir = data_dir / "logs"
        upstream_url = options.upstream_url
        upstream_port = None
        if upstream_url is None:
            upstream_port = free_port("the reference upstream", preferred=UPSTREAM_PORT_PREFERRED)
            upstream_url = f"http://{LOOPBACK}:{upstream_port}"
        environment = {
            **os.environ,
            **embedded.endpoints.environment(),
            f"{PREFIX}UPSTREAM_URL": upstream_url,
            f"{PREFIX}API_HOST": options.host,
            f"{PREFIX}API_ACCESS": os.environ.get(f"{PREFIX}API_ACCESS") or "open-without-keys",
            f"{PREFIX}API_PORT": str(api_port),
            f"{PREFIX}API_SHUTDOWN_DELAY_S": "0",  # no load balancer
            f"{PREFIX}KAFKA_PARTITIONS": str(PARTITIONS),
            f"{PREFIX}TABLES_INTERVAL_S": os.environ.get(f"{PREFIX}TABLES_INTERVAL_S") or str(TABLES_INTERVAL_S),
            # The embedded broker never evicts a killed member; a member with the same id replaces it.
            f"{PREFIX}KAFKA_GROUP_INSTANCE_ID": "local",
            "PYTHONUNBUFFERED": "1",
        }
        variables_file = _write_variables(data_dir, embedded.endpoints, upstream_url)
        health_ports = {name: free_port(f"the health of the {name}") for name in SERVICES}
        services = [
            _service(name, arguments, health_ports[name], environment, logs_dir) for name, arguments in SERVICES.items()
        ]
        api_url = f"http://{LOOPBACK if options.host == '0.0.0.0' else options.host}:{api_port}"  # noqa: S104  # not bound here
        api = _child("api", ("serve", "api"), environment, logs_dir, health_url=f"{api_url}/health/ready")
        broker = BrokerState(data_dir)
        ended.callback(broker.save)

        def observe(event: ChildEvent) -> None:
            broker.observe(event)
            on_event(event)

        async with embedded.run(on_event=observe, handle_signals=handle_signals) as supervisor:
            settings = load_settings(environment)
            os.environ.update(embedded.endpoints.environment())  # the S3 client reads its keys there
            await _once_available(lambda: _provision(settings))
            recovered = None
            if broker.incomplete:
                recovered = await _once_available(lambda: recover(settings))
                broker.incomplete = False
            if upstream_port is not None:
                arguments = ("upstream", "--port", str(upstream_port), *options.upstream_arguments)
                health_url = f"{upstream_url}/health"
                await supervisor.start(_child("upstream", arguments, environment, logs_dir, health_url=health_url))
            await supervisor.start(*services, api)
            yield RunningStack(
                api_url=api_url,
                upstream_url=upstream_url,
                endpoints=embedded.endpoints,
                variables_file=variables_file,
                environment=environment,
                metrics_urls={
                    "API": f"{api_url}/metrics",
                    **{name: f"http://{LOOPBACK}:{port}/metrics" for name, port in health_ports.items()},
                },
                supervisor=supervisor,
                recovered=recovered,
            )


def _write_variables(data_dir: Path, endpoints: Endpoints, upstream_url: str) -> Path:
    """Write a file with the addresses and keys of the stack, which a shell can source."""
    path = data_dir / "environment"
    variables = {**endpoints.environment(), f"{PREFIX}UPSTREAM_URL": upstream_url}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    write_private(path, "".join(lines).encode())
    return path


async def _provision(settings: Settings) -> None:
    await apply_topics(settings)
    async with S3Store(settings) as store:
        await provision_schema_switch(store)
        await provision_pointer(store)
        await trust_change_counters(store)  # also in a bucket of an earlier build, since all processes run this one


async def _once_available(work: Callable[[], Awaitable[_Result]]) -> _Result:
    """Run ``work``. Retry it a few times, because S3 and Kafka have only just started."""
    for _ in range(TRIES_MAX - 1):
        with contextlib.suppress(DependencyUnavailable):
            return await work()
        await asyncio.sleep(TRY_WAIT_S)
    return await work()


def _service(
    name: str, arguments: tuple[str, ...], health_port: int, environment: Mapping[str, str], logs_dir: Path
) -> ChildProcess:
    own = {f"{PREFIX}HEALTH_HOST": LOOPBACK, f"{PREFIX}HEALTH_PORT": str(health_port)}
    health_url = f"http://{LOOPBACK}:{health_port}/health/ready"
    return _child(name, arguments, {**environment, **own}, logs_dir, health_url=health_url)


def _child(
    name: str, arguments: tuple[str, ...], environment: Mapping[str, str], logs_dir: Path, *, health_url: str
) -> ChildProcess:
    return ChildProcess(
        name=name,
        argv=(sys.executable, "-m", "tripfold", *arguments),
        env=dict(environment),
        log_path=logs_dir / f"{name}.log",
        ready=http_probe(health_url),
    )
