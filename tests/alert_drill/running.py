"""Runs a Prometheus with the alerts of deploy/, and services that a drill can stop and start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import yaml

from tests import ROOT
from tests.chaos.relay import HOST
from tests.chaos.system import System, service
from tests.integration.running import until
from tests.prometheus import find
from tripfold.local.ports import free_port
from tripfold.local.supervisor import ChildProcess, Supervisor, http_probe

CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"


class Deployment:
    """The services of a system, each with its own supervisor. Use it as an async context manager.

    The load pauses while ``busy`` is not set.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.busy = asyncio.Event()
        self.busy.set()
        self.verified = system.directory / "verified"
        self.verified_address = f"{HOST}:{free_port('the result of verify')}"
        self._running: dict[str, contextlib.AsyncExitStack] = {}
        self._supervisors: dict[str, Supervisor] = {}

    async def __aenter__(self) -> Self:
        self.verified.mkdir()
        host, _, port = self.verified_address.partition(":")
        server = ChildProcess(
            name="verified",
            argv=(sys.executable, "-m", "http.server", port, "--bind", host, "--directory", str(self.verified)),
            env=dict(os.environ),
            log_path=self.system.directory / "logs" / "verified.log",
            ready=http_probe(f"http://{self.verified_address}/"),
        )
        stack = self._running["verified"] = contextlib.AsyncExitStack()
        supervisor = await stack.enter_async_context(Supervisor())
        await supervisor.start(server)
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self._running):
            await self.stop(name)

    async def start(self, *names: str) -> None:
        """Start services, and wait until they are live."""
        for name in names:
            stack = self._running[name] = contextlib.AsyncExitStack()
            supervisor = self._supervisors[name] = await stack.enter_async_context(Supervisor())
            await supervisor.start(service(self.system, name))

    async def stop(self, name: str) -> None:
        """Stop a service until it is started again."""
        await self._running.pop(name).aclose()

    async def request(self, date: str) -> None:
        """Request a date, unless the API refuses or cannot be reached."""
        with contextlib.suppress(httpx.HTTPError):
            await self.system.client.post(f"{self.system.api_url}/process-request", params={"date": date})

    async def verify(self) -> None:
        """Verify the bucket, and show the result to Prometheus, as the profile observe of Docker Compose does."""
        await self.system.command("verify", "--metrics-file", str(self.verified / "metrics.txt"))

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a service; if it ends, it is restarted."""
        self._supervisors[name].kill(name, number)

    async def ready(self) -> None:
        """Wait until every service is ready."""
        await until(self.system.all_ready, f"the services to be ready; logs in {self.system.directory}")


class Prometheus(msgspec.Struct, frozen=True):
    """A client of a running Prometheus."""

    url: str
    client: httpx.AsyncClient

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the labels of each result of an expression."""
        response = await self.client.get(f"{self.url}/api/v1/query", params={"query": expression})
        assert response.status_code == httpx.codes.OK, response.text
        return [one["metric"] for one in response.json()["data"]["result"]]

    async def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        response = await self.client.get(f"{self.url}/api/v1/alerts")
        return {one["labels"]["alertname"] for one in response.json()["data"]["alerts"] if one["state"] == "firing"}


def configuration(targets: Mapping[str, Iterable[str]], interval_s: int) -> dict[str, Any]:
    """Return the configuration of deploy/ with other targets, by job, and another interval, without Alertmanager."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": f"{interval_s}s", "evaluation_interval": f"{interval_s}s"}
    config["rule_files"] = [str(CONFIG.parent / path) for path in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for job in jobs.values():
        job.pop("dns_sd_configs", None)
    config["scrape_configs"] = [
        jobs[name] | {"static_configs": [{"targets": list(addresses)}]} for name, addresses in targets.items()
    ]
    del config["alerting"]
    return config


@contextlib.asynccontextmanager
async def prometheus(deployment: Deployment, directory: Path, interval_s: int) -> AsyncIterator[Prometheus]:
    """Run a Prometheus without a past during the block; it scrapes the deployment."""
    path = _write_configuration(deployment, directory, interval_s)
    program = find("prometheus")
    assert program is not None, "no prometheus: run `python -m tests.prometheus`"
    address = f"{HOST}:{free_port('Prometheus')}"
    child = ChildProcess(
        name="prometheus",
        argv=(
            program,
            f"--config.file={path}",
            f"--storage.tsdb.path={directory / 'samples'}",
            f"--web.listen-address={address}",
        ),
        env=dict(os.environ),
        log_path=directory / "prometheus.log",
        ready=http_probe(f"http://{address}/-/ready"),
    )
    async with Supervisor() as supervisor:
        await supervisor.start(child)
        yield Prometheus(f"http://{address}", deployment.system.client)


def _write_configuration(deployment: Deployment, directory: Path, interval_s: int) -> Path:
    targets = {"verify": [deployment.verified_address]}
    for name, url in deployment.system.health_urls.items():
        targets.setdefault(name.partition("-")[0], []).append(url.removeprefix("http://"))
    directory.mkdir(parents=True)
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration(targets, interval_s)))
    return path
