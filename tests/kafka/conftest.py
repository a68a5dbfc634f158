"""Fixtures: Tripfold on a real Apache Kafka, with two workers and two aggregates as processes.

These tests stop brokers, kill processes, and take minutes. ``make test-kafka`` runs them; it sets the variable without
which they are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from shared.runtime.settings import PREFIX
from tests.apache_kafka import REAL_VARIABLE
from tests.chaos.relay import NetworkState
from tests.chaos.system import ARGUMENTS, System, SystemConfig, running_system, start_services
from tests.integration.running import ENDED, eventually
from tripfold.local.ports import free_port

DATES = tuple(f"2024-05-{day:02}" for day in range(1, 16))
CITIES = 10


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder without REAL_VARIABLE; all of them share one event loop."""
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.timeout(900))
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            if os.environ.get(REAL_VARIABLE) != "1":
                item.add_marker(pytest.mark.skip(reason="needs a real Apache Kafka: make test-kafka"))


class Tripfold(msgspec.Struct, frozen=True):
    """The shared system, with requests and checks."""

    system: System

    async def post(self, date: str) -> str:
        """Request a date until the API accepts it; return the location of its status."""

        async def try_post() -> str | None:
            try:
                url = f"{self.system.api_url}/process-request"
                response = await self.system.client.post(url, params={"date": date})
            except httpx.HTTPError:
                return None
            return str(response.headers["location"]) if response.status_code == 202 else None

        return await eventually(try_post, f"a request of {date} to be accepted")

    async def completed(self, location: str) -> None:
        """Wait until a request has ended; check that no city failed."""

        async def look() -> dict[str, Any] | None:
            try:
                response = await self.system.client.get(f"{self.system.api_url}{location}")
            except httpx.HTTPError:
                return None
            request: dict[str, Any] = response.json()
            return request if request.get("status") in ENDED else None

        request = await eventually(look, f"{location} to end; logs in {self.system.directory}", deadline_s=120)
        assert request["status"] == "completed", request

    async def assert_exact(self, *dates: str) -> None:
        """Check with the oracle that the stored, published and served sums of ``dates`` are the upstream's."""
        code, output = await self.system.oracle(*dates, truth=True)
        assert code == 0, output
        checked = json.loads(output)
        assert checked["city_days"] == CITIES * len(dates), checked

    async def downloads_started(self, date: str) -> None:
        """Wait until workers download files of a date."""
        before = self.system.upstream.requests

        async def look() -> bool | None:
            return self.system.upstream.requests >= before + 3 or None

        await eventually(look, f"downloads of {date}")

    async def ready(self, *names: str) -> None:
        """Wait until the named services, or all, report that they are ready."""
        started_s = time.monotonic()

        async def look(name: str) -> bool | None:
            return await self.system.ready(name) or None

        for name in names or self.system.config.services:
            what = f"{name} to be ready; logs in {self.system.directory}"
            await eventually(partial(look, name), what, deadline_s=max(1.0, started_s + 90 - time.monotonic()))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """Run the system; every test leaves it healthy, and uses its own dates."""
    config = SystemConfig(
        cities=CITIES,
        dates=DATES,
        seed=7,
        large_files=False,
        session_timeout_s=45,  # longer than a static member takes to restart
        settings=(("INGEST_STREAMS", "2"),),
    )
    async with running_system(config, tmp_path_factory.mktemp("system")) as running:
        await start_services(running)
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def tripfold(system: System) -> AsyncIterator[Tripfold]:
    """Yield the shared system once it is ready; remove all faults after the test."""
    running = Tripfold(system)
    await running.ready()
    yield running
    system.s3.rates = {}
    system.s3.script = []
    system.s3.down = False
    system.upstream.rates = {}
    await system.network.set_state(NetworkState.OPEN)


@contextlib.asynccontextmanager
async def joined(
    system: System, name: str, *, program: Sequence[str] = ("-m", "tripfold"), ready: bool = True, **settings: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run one more service during the block, by default once it is ready; check that it exits on SIGTERM."""
    port = free_port(name)
    system.health_urls[name] = f"http://127.0.0.1:{port}"
    own = {"HEALTH_PORT": str(port), **settings}
    environment = system.environment | {f"{PREFIX}{setting}": value for setting, value in own.items()}
    log = (system.directory / "logs" / f"{name}.log").open("ab")
    command = [sys.executable, *program, *ARGUMENTS[name.partition("-")[0]]]
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log)
    try:
        if ready:
            await Tripfold(system).ready(name)
        yield process
        if process.returncode is None:
            process.terminate()
        # After a graceful shutdown uvicorn raises the signal again, so the exit code can be that of SIGTERM.
        assert await asyncio.wait_for(process.wait(), 15) in {0, -signal.SIGTERM}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        log.close()
