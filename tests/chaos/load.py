"""The load of a chaos campaign: requests of dates, a backfill and a schedule without pause, corrections and moves."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import random
from collections.abc import Coroutine
from typing import Any

import httpx

from tests.chaos.report import RECOVERY_DEADLINE_S, CampaignReport
from tests.chaos.system import System
from tests.integration.running import ENDED, eventually

REQUESTS_OPEN_MAX = 10
SCHEDULE = "chaos"
SCHEDULE_AGE_MAX_D = 366


class Load:
    """Uses a system as its clients do, and counts in the report what the API accepted and what became of it.

    ``open`` holds the last known state of each accepted request and backfill that has not ended, by its path.
    """

    def __init__(self, system: System, report: CampaignReport, draw: random.Random) -> None:
        self.open: dict[str, dict[str, Any]] = {}
        self._system = system
        self._report = report
        self._draw = draw
        self._dates = system.config.dates

    def activities(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """Return what runs at the same time during a campaign."""
        return self._request(), self._follow(), self._change(), self._backfill(), self._schedule()

    async def _request(self) -> None:
        while True:
            if len(self.open) < REQUESTS_OPEN_MAX:
                await self.post(self._draw.choice(self._dates))
            await asyncio.sleep(self._draw.uniform(0.2, 1.5))

    async def post(self, date: str) -> bool | None:
        """Request a date; return True if the API accepted it, else None."""
        return await self._start("/process-request", date=date) is not None or None

    async def _start(self, path: str, **query: str) -> str | None:
        """Start a request or a backfill; return its path if the API accepted it, else None."""
        response = await self._call("POST", path, **query)
        if response is None or response.status_code != httpx.codes.ACCEPTED:
            self._report.requests_refused += 1
            return None
        self._report.requests_accepted += 1
        location = str(response.headers["location"])
        self._report.requests_joined += location in self.open
        self.open[location] = {}
        return location

    async def _backfill(self) -> None:
        """Process all dates again and again, as a backfill with lower priority beside the requests."""
        location = None
        while True:
            if location not in self.open:
                wanted = {"from": self._dates[0], "to": self._dates[-1], "only": "all", "max_parallel": "2"}
                location = await self._start("/backfills", **wanted)
            await asyncio.sleep(1.0)

    async def _schedule(self) -> None:
        """Let a schedule process all dates each minute, if they are recent enough for a schedule."""
        first, last = (dt.date.fromisoformat(self._dates[position]) for position in (0, -1))
        days = (last - dt.datetime.now(dt.UTC).date()).days
        if days < -SCHEDULE_AGE_MAX_D:
            return
        options = {"cron": "* * * * *", "date": str(days), "recheck": str((last - first).days), "max_parallel": "2"}
        await self._until_done("PUT", f"/schedules/{SCHEDULE}", **options)
        await asyncio.Event().wait()

    async def end(self) -> None:
        """Delete the schedule, so that only what has begun is left; follow the runs that it began."""
        await self._until_done("DELETE", f"/schedules/{SCHEDULE}")
        response = await self._until_done("GET", "/backfills", limit="500")
        runs = [one for one in response.json()["backfills"] if one["schedule"] == SCHEDULE]
        self._report.schedule_runs = len(runs)
        self.open.update((f"/backfills/{one['id']}", one) for one in runs)

    async def _follow(self) -> None:
        while True:
            await self.update()
            await asyncio.sleep(1.0)

    async def update(self) -> None:
        """Ask for the state of everything open, and count what has ended."""
        for location in list(self.open):
            response = await self._call("GET", location)
            if response is not None and response.status_code == httpx.codes.NOT_FOUND:
                self._report.differences.append(f"{location} was accepted but the API does not know it")
                del self.open[location]
            elif response is not None and response.is_success:
                self._update(location, response.json())

    def _update(self, location: str, state: dict[str, Any]) -> None:
        self.open[location] = state
        if state["status"] not in ENDED or state.get("under_way"):
            return
        del self.open[location]
        if location.startswith("/backfills/"):
            self._report.backfills_ended += 1
            return
        ended = self._report.requests_ended
        ended[state["status"]] = ended.get(state["status"], 0) + 1
        self._report.city_days_done += state["counts"]["cities_done"]
        self._report.city_days_failed += state["counts"]["cities_failed"]

    async def _call(self, method: str, path: str, **query: str) -> httpx.Response | None:
        """Call the API; return None if it cannot be reached."""
        with contextlib.suppress(httpx.HTTPError):
            return await self._system.client.request(method, f"{self._system.api_url}{path}", params=query)
        return None

    async def _until_done(self, method: str, path: str, **query: str) -> httpx.Response:
        """Call the API until it is available; return its response."""

        async def call() -> httpx.Response | None:
            response = await self._call(method, path, **query)
            return None if response is None or response.is_server_error else response

        return await eventually(call, f"{method} {path} to succeed", deadline_s=RECOVERY_DEADLINE_S)

    async def _change(self) -> None:
        """Let the upstream correct files and move cities."""
        while True:
            await asyncio.sleep(self._draw.uniform(0.2, 1.2))
            self._system.upstream.correct(self._draw.choice(self._dates))
            if self._draw.random() < 0.25:
                self._system.upstream.move()
