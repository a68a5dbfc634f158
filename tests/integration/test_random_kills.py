"""Ingest killed with SIGKILL at random under load.

The fault model: a process may end between any two of its instructions. Parts of an upload may be under way, the
manifest written and nothing published, or everything published and nothing committed. Several dates are in progress.
The test kills the planner or the worker at a random time after the first download; its supervisor starts it again.
Then the test compares every stored file with the upstream's own bytes, and every number with the sums of those bytes.

TRIPFOLD_TEST_KILLS and TRIPFOLD_TEST_KILL_DATES make it longer (`make soak`). TRIPFOLD_TEST_SEED repeats a run, up to
the timing of the machine. A failing run prints its seed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shared.domain import objects
from shared.domain.objects import Manifest
from tests.integration.conftest import isolated_settings
from tests.integration.running import Running, eventually, running
from tests.integration.trips import figures_of, make_trips
from tests.integration.upstream import UpstreamServer
from tripfold.local.embedded import EmbeddedServices
from tripfold.local.supervisor import RESTART_WINDOW_S, RESTARTS_MAX

KILLS = int(os.environ.get("TRIPFOLD_TEST_KILLS", "1"))
DATES = int(os.environ.get("TRIPFOLD_TEST_KILL_DATES", "2"))
SEED = int(os.environ.get("TRIPFOLD_TEST_SEED", random.randrange(2**32)))
CITIES = 5
TRIPS = 4000
STREAMS = 4
KILL_WITHIN_S = 0.8
REQUESTS_MAX = 3
BETWEEN_KILLS_S = RESTART_WINDOW_S / RESTARTS_MAX + 1
"""A supervisor gives up on what dies more often; a few kills may come closer."""


@pytest.mark.timeout(120 + 60 * KILLS)
async def test_files_and_totals_are_exact_after_random_kills(embedded: EmbeddedServices, tmp_path: Path) -> None:
    """After random kills every raw object is the upstream's file, every total is exact, and nothing came twice."""
    print(f"seed {SEED}")  # noqa: T201  # pytest shows it when the test fails
    draw = random.Random(SEED)
    dates = [f"2024-{1 + number // 28:02}-{1 + number % 28:02}" for number in range(DATES)]
    with UpstreamServer(etags=draw.random() < 0.5) as upstream:
        files = _fill(upstream, dates, draw)
        upstream.pace_s = 0.03
        settings = isolated_settings(embedded, UPSTREAM_URL=upstream.url)
        async with running(settings, tmp_path) as tripfold:
            places = [await tripfold.request(date) for date in dates]
            await _kill_at_random(tripfold, upstream, draw)
            upstream.pace_s = 0.0
            for date, place in zip(dates, places, strict=True):
                await _completed(tripfold, date, place)
            await _assert_all_is_right(tripfold, upstream, files)


def _fill(upstream: UpstreamServer, dates: Sequence[str], draw: random.Random) -> dict[str, dict[str, list[Any]]]:
    """Make every city's files; return the trips by date and country."""
    files: dict[str, dict[str, list[Any]]] = {date: {"peru": [], "malta": []} for date in dates}
    for city in range(CITIES):
        country = ("Peru", "Malta")[city % 2]
        upstream.add_city(city, f"City {city}", country)
        for date in dates:
            trips = make_trips(draw.randrange(2**32), draw.randrange(TRIPS // 2, TRIPS), date)
            upstream.put(city, date, trips)
            files[date][country.lower()].append(trips)
    return files


async def _kill_at_random(tripfold: Running, upstream: UpstreamServer, draw: random.Random) -> None:
    for number in range(KILLS):
        await eventually(partial(_downloads_since, upstream, len(upstream.requests)), "a download, or all to be done")
        await asyncio.sleep(draw.uniform(0, KILL_WITHIN_S))
        victim = draw.choice(("worker", "worker", "worker", "planner"))
        print(f"kill {number + 1}: the {victim}, after {len(upstream.requests)} requests")  # noqa: T201  # as above
        await eventually(partial(_killed, tripfold, victim), f"the {victim} to run, which was killed before")
        if number >= RESTARTS_MAX - 2:
            await asyncio.sleep(BETWEEN_KILLS_S)


async def _killed(tripfold: Running, victim: str) -> bool | None:
    with suppress(LookupError):
        tripfold.supervisor.kill(victim)
        return True
    return None


async def _downloads_since(upstream: UpstreamServer, requests_before: int) -> bool | None:
    every_file_was_asked_for = {path for path in upstream.requests if "/stats" in path}
    if len(every_file_was_asked_for) == len(upstream.files):
        return True
    return any("/stats" in path for path in upstream.requests[requests_before:]) or None


async def _completed(tripfold: Running, date: str, place: str) -> None:
    """Wait for a request's end; ask again, as an operator would, for cities that were given up as killing a worker."""
    request = await tripfold.ended(place)
    for _ in range(REQUESTS_MAX):
        if request["status"] == "completed":
            return
        print(f"{date}: {request['status']}, {request['failures']}")  # noqa: T201  # as above
        request = await tripfold.process(date)
    assert request["status"] == "completed"


async def _assert_all_is_right(
    tripfold: Running, upstream: UpstreamServer, files: dict[str, dict[str, list[Any]]]
) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    async for one in tripfold.store.list("manifests/"):
        found = await tripfold.store.get(one.key)
        assert found is not None
        manifest = objects.decode(Manifest, found.body, one.key)
        seen[manifest.city_id, str(manifest.date)] += 1
        raw = await tripfold.store.get(manifest.raw_key)
        assert raw is not None, f"{one.key} names {manifest.raw_key}, which is not there"
        body = upstream.files[manifest.city_id, str(manifest.date)]
        assert isinstance(body, bytes)
        assert hashlib.sha256(raw.body).hexdigest() == manifest.sha256 == hashlib.sha256(body).hexdigest(), one.key
        assert manifest.history == (), f"{one.key}: the same bytes became a second revision"
    assert seen == Counter(upstream.files.keys())
    for date, by_country in files.items():
        statistics = await tripfold.stats(date, detail="full")
        assert statistics.keys() == by_country.keys()
        for country, of_cities in by_country.items():
            expected = {**figures_of(*of_cities), "cities_reported": len(of_cities), "complete": True}
            assert {name: statistics[country][date][name] for name in expected} == expected, (date, country)
