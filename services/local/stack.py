"""The whole of Tripfold on one machine: S3, Kafka, the reference upstream and the services, under one supervisor."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import msgspec

from services.local.embedded import Endpoints, open_embedded_stack
from services.local.ports import free_port, release_ports
from services.local.supervisor import ChildEvent, ChildProcess, Supervisor, http_probe
from shared.current import provision_pointer
from shared.patience import SurroundingsFault
from shared.s3 import S3Store
from shared.settings import PREFIX, load_settings
from shared.topics_admin import apply_topics

LOOPBACK = "127.0.0.1"
PARTITIONS = 4
UPSTREAM_PORT_PREFERRED = 8090
PROVISION_TRIES_MAX = 20


class StackOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a local stack is to be. ``upstream_url`` of None: the reference upstream."""

    data_dir: Path
    host: str = LOOPBACK
    port: int = 8080
    upstream_url: str | None = None
    upstream_arguments: tuple[str, ...] = ()


class RunningStack(msgspec.Struct, frozen=True, kw_only=True):
    """A stack whose every part is ready, and where it can be reached."""

    api_url: str
    upstream_url: str
    endpoints: Endpoints
    variables_file: Path
    environment: Mapping[str, str]
    supervisor: Supervisor


@contextlib.asynccontextmanager
async def local_stack(
    options: StackOptions, *, on_event: Callable[[ChildEvent], None], handle_signals: bool = True
) -> AsyncIterator[RunningStack]:
    """Start a stack, in the order in which its parts need each other; stop it when the context is left.

    Raises the named errors of ``services.local.embedded``, ``ports`` and ``supervisor``, each with one clear sentence.
    Leaving because a stop was requested is not an error: ask ``supervisor.failure``.
    """
    with contextlib.ExitStack() as claimed:

        def claim(what: str, *, fixed: int | None = None, preferred: int | None = None) -> int:
            port = free_port(what, fixed=fixed, preferred=preferred)
            claimed.callback(release_ports, port)
            return port

        api_port = claim("the API", fixed=options.port)
        embedded = claimed.enter_context(open_embedded_stack(options.data_dir))
        logs_dir = options.data_dir.expanduser().absolute() / "logs"
        upstream_url = options.upstream_url
        upstream_port = None
        if upstream_url is None:
            upstream_port = claim("the reference upstream", preferred=UPSTREAM_PORT_PREFERRED)
            upstream_url = f"http://{LOOPBACK}:{upstream_port}"
        environment = {
            **os.environ,
            **embedded.endpoints.environment(),
            f"{PREFIX}UPSTREAM_URL": upstream_url,
            f"{PREFIX}API_HOST": options.host,
            f"{PREFIX}API_ACCESS": os.environ.get(f"{PREFIX}API_ACCESS") or "open-without-keys",
            f"{PREFIX}API_PORT": str(api_port),
            f"{PREFIX}KAFKA_PARTITIONS": str(PARTITIONS),
            # A static member takes over at once from one that was killed; the embedded broker evicts nobody.
            f"{PREFIX}CONSUMER_INSTANCE": "local",
            "PYTHONUNBUFFERED": "1",
        }
        variables_file = _write_variables(options.data_dir, embedded.endpoints, upstream_url)
        services = [
            _service(name, arguments, claim(f"the health of the {name}"), environment, logs_dir)
            for name, arguments in (
                ("planner", ("serve", "ingest", "--role", "planner")),
                ("worker", ("serve", "ingest", "--role", "worker")),
                ("aggregate", ("serve", "aggregate")),
            )
        ]
        api_url = f"http://{LOOPBACK if options.host == '0.0.0.0' else options.host}:{api_port}"  # noqa: S104  # not bound here
        api = _child("api", ("serve", "api"), environment, logs_dir, health_url=f"{api_url}/health/ready")
        async with Supervisor(
            on_event=on_event, handle_signals=handle_signals, held_fds=embedded.held_fds
        ) as supervisor:
            await supervisor.start(*embedded.children)
            await _provision(environment)
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
                supervisor=supervisor,
            )


def _write_variables(data_dir: Path, endpoints: Endpoints, upstream_url: str) -> Path:
    """Write the variables that lead clients and the commands of an operator to the stack, for a shell to read."""
    path = data_dir / "environment"
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    variables = {**endpoints.environment(), f"{PREFIX}UPSTREAM_URL": upstream_url}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(lines)
    draft.replace(path)
    return path


async def _provision(environment: Mapping[str, str]) -> None:
    settings = load_settings(environment)
    for tries_left in range(PROVISION_TRIES_MAX, 0, -1):
        try:
            await apply_topics(settings)
        except SurroundingsFault:
            if tries_left == 1:
                raise
        else:
            break
    async with S3Store(settings) as store:
        await provision_pointer(store)


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
        argv=(sys.executable, "-m", "services", *arguments),
        env=dict(environment),
        log_path=logs_dir / f"{name}.log",
        ready=http_probe(health_url),
        ready_deadline_s=60.0,
        restart=True,
    )
