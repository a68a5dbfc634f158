"""Tripfold's services as processes of any build, and a load of requests that goes on while they are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from shared.runtime.settings import PREFIX, Settings
from tests.integration.running import ENDED, environment_of, eventually
from tests.integration.trips import figures_of, make_trips
from tests.integration.upstream import UpstreamServer
from tripfold.local.ports import free_port

SERVICES = {"ingest": ("serve", "ingest"), "aggregate": ("serve", "aggregate"), "api": ("serve", "api")}
COUNTRIES = {1: "Armenia", 2: "Armenia", 3: "Brasil", 4: "Brasil", 5: "Chile"}
DATES = tuple(f"2024-05-{day:02}" for day in range(1, 7))
PAUSE_S = 0.2


class System:
    """The three services. Each can be replaced by its process of another build."""

    def __init__(self, settings: Settings, logs: Path) -> None:
        self._settings = settings
        self._logs = logs
        self._ports = {name: free_port(f"{name} of a test") for name in SERVICES}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self.client = httpx.AsyncClient(base_url=self._url("api"), timeout=30, trust_env=False)

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    async def replace(self, name: str, build: Path) -> None:
        """Stop a service, start that of a build, and wait until it is ready."""
        await self.stop(name)
        own = {f"{PREFIX}{'API' if name == 'api' else 'HEALTH'}_PORT": str(self._ports[name])}
        environment = (
            environment_of(self._settings) | own | {f"{PREFIX}API_ACCESS": "open", f"{PREFIX}API_SHUTDOWN_DELAY_S": "0"}
        )
        with self.log(name).open("ab") as log:
            self._processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tripfold", *SERVICES[name], cwd=build, env=environment, stdout=log, stderr=log
            )
        await eventually(lambda: self.readiness(name, ready=True), f"the {name} of {build} to be ready")

    async def readiness(self, name: str, *, ready: bool) -> str | None:
        """Return a service's readiness report if it is ``ready``, else None."""
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                response = await client.get(f"{self._url(name)}/health/ready")
        except httpx.TransportError:
            return None
        return response.text if (response.status_code == 200) == ready else None

    async def stop(self, name: str) -> None:
        """Stop a service as an orchestrator does, if it runs."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.terminate()
            await process.wait()

    def log(self, name: str) -> Path:
        """Return the log of a service, of all its builds."""
        return self._logs / f"{name}.log"


@contextlib.asynccontextmanager
async def running_system(settings: Settings, logs: Path) -> AsyncIterator[System]:
    """Give a system without processes; stop those that it has at the end."""
    system = System(settings, logs)
    try:
        yield system
    finally:
        for name in SERVICES:
            await system.stop(name)
        await system.client.aclose()


class Load:
    """Changes files of the upstream and requests their dates, without an end."""

    def __init__(self, system: System, upstream: UpstreamServer, seed: int) -> None:
        self._system = system
        self._upstream = upstream
        self._draw = random.Random(seed)
        self.files: dict[tuple[int, str], list[dict[str, Any]]] = {}
        self._open: list[str] = []
        for city, country in COUNTRIES.items():
            upstream.add_city(city, f"City {city}", country)
        for date in DATES:
            for city in COUNTRIES:
                self._put(city, date)

    def _put(self, city: int, date: str) -> None:
        self.files[city, date] = make_trips(self._draw.randrange(1 << 30), self._draw.randrange(1, 300), date)
        self._upstream.put(city, date, self.files[city, date])

    async def request(self, date: str) -> None:
        """Request a date, again until the API accepts it."""

        async def accepted() -> str | None:
            try:
                response = await self._system.client.post("/process-request", params={"date": date})
            except httpx.TransportError:
                return None
            assert response.status_code in {202, 503}, response.text
            return response.headers["location"] if response.status_code == 202 else None

        self._open.append(await eventually(accepted, f"a request of {date} to be accepted"))

    async def _run(self) -> None:
        while True:
            date = self._draw.choice(DATES)
            self._put(self._draw.choice(list(COUNTRIES)), date)
            await self.request(date)
            await asyncio.sleep(PAUSE_S)

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Run the load during the block. Then request every date, and wait until all requests have ended well."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            ended_early = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert not ended_early
        for date in DATES:
            await self.request(date)
        for location in self._open:
            await eventually(partial(self.ended, location), f"{location} to end")
        self._open.clear()

    async def ended(self, location: str) -> bool | None:
        """Return whether a request or backfill has ended well, or None while it runs."""
        response = await self._system.client.get(location)
        assert response.status_code == 200, response.text
        status = response.json()["status"]
        assert status not in {"failed", "completed with failures"}, response.text
        return True if status in ENDED else None

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return what the API must report of all dates."""
        countries = sorted({*COUNTRIES.values()})
        return {
            country.lower(): {
                date: figures_of(*(self.files[city, date] for city, of in COUNTRIES.items() if of == country))
                for date in DATES
            }
            for country in countries
        }
