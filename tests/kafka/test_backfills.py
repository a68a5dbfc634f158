"""A backfill of many dates on a real Kafka, with two workers and two planners. One is killed every ten seconds."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.system import System, SystemConfig, running_system, start_services
from tests.integration.running import ENDED, eventually
from tests.kafka.conftest import Tripfold

DATES = tuple(str(dt.date(2023, 1, 1) + dt.timedelta(days=day)) for day in range(200))
CITIES = 2
SERVICES = ("api", "planner-1", "planner-2", "worker-1", "worker-2", "aggregate-1")
VICTIMS = ("worker-1", "planner-1", "worker-2", "planner-2")
BETWEEN_KILLS_S = 10.0
DEADLINE_S = 700.0


@contextlib.asynccontextmanager
async def killing(system: System) -> AsyncIterator[None]:
    """Kill a worker or a planner every ten seconds during the block."""

    async def kill() -> None:
        for victim in itertools.cycle(VICTIMS):
            await asyncio.sleep(BETWEEN_KILLS_S)
            with contextlib.suppress(LookupError):  # it is being restarted
                system.supervisor.kill(victim)

    killer = asyncio.create_task(kill())
    try:
        yield
    finally:
        killer.cancel()
        await asyncio.gather(killer, return_exceptions=True)


async def ended(system: System, path: str) -> dict[str, Any]:
    """Wait until a backfill has ended, and return it."""

    async def look() -> dict[str, Any] | None:
        try:
            response = await system.client.get(f"{system.api_url}{path}")
        except httpx.HTTPError:
            return None
        backfill: dict[str, Any] = response.json()
        return backfill if backfill.get("status") in ENDED and not backfill["under_way"] else None

    return await eventually(look, f"{path} to end; logs in {system.directory}", deadline_s=DEADLINE_S)


async def test_a_backfill_is_exact_while_processes_are_killed(tmp_path: Path) -> None:
    """Each date is requested under one id and completes; the oracle finds every number exact."""
    config = SystemConfig(services=SERVICES, cities=CITIES, dates=DATES, seed=11, large_files=False)
    async with running_system(config, tmp_path) as system:
        await start_services(system)
        await Tripfold(system).ready()
        wanted = {"from": DATES[0], "to": DATES[-1], "only": "all", "max_parallel": "16"}
        response = await system.client.post(f"{system.api_url}/backfills", params=wanted)
        assert response.status_code == 202, response.text
        async with killing(system):
            backfill = await ended(system, response.headers["location"])
        assert (backfill["status"], backfill["counts"]["dates_completed"]) == ("completed", len(DATES)), backfill
        listed = await system.client.get(f"{system.api_url}/process-requests", params={"limit": "500"})
        found = [(request["date"], request["status"]) for request in listed.json()["requests"]]
        assert sorted(found) == [(date, "completed") for date in DATES]
        await Tripfold(system).ready()
        code, output = await system.oracle(*DATES, truth=True)
        assert code == 0, output
        assert json.loads(output)["city_days"] == CITIES * len(DATES)
