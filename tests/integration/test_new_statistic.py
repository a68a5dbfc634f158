"""A new statistic, as a developer would add it: beside the build of this tree runs one that has it.

The newer build is a copy of the sources with the changes that docs/how-to/add-a-statistic.md names: a field with a
default, its sum, and the versions of rules, objects and events raised. Both work on one bucket and one Kafka.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.domain import events, keys
from shared.domain.ids import CountrySlug
from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.settings import Settings
from shared.storage.s3 import S3Store
from tests import ROOT
from tests.fakes.bucket import DAY, FakeBucket, trips
from tests.integration.running import environment_of, eventually
from tripfold.local.ports import free_port

CHANGES = [
    (
        "shared/domain/contribution.py",
        "    delay_total_ms: int\n",
        "    delay_total_ms: int\n    late_trips: int = 0\n",
    ),
    (
        "shared/domain/contribution.py",
        "        return Contribution(\n",
        "        return Contribution(\n            late_trips=self.late_trips + other.late_trips,\n",
    ),
    (
        "services/ingest/parsing/totals.py",
        "        self._accidents = 0\n",
        "        self._accidents = self._late_trips = 0\n",
    ),
    (
        "services/ingest/parsing/totals.py",
        "        self._delay_total_ms += delay\n",
        "        self._delay_total_ms += delay\n        self._late_trips += delay > 0\n",
    ),
    (
        "services/ingest/parsing/totals.py",
        "        self.trips += len(trips)\n",
        "        self.trips += len(trips)\n        self._late_trips += sum(self._delays[a.delay] > 0 for a in trips)\n",
    ),
    (
        "services/ingest/parsing/totals.py",
        "            delay_total_ms=self._delay_total_ms,\n",
        "            delay_total_ms=self._delay_total_ms,\n            late_trips=self._late_trips,\n",
    ),
]
VERSIONS = [
    ("services/ingest/parsing/trips.py", r"^RULE_VERSION: Final = (\d+)$"),
    ("shared/domain/objects.py", r"^SCHEMA_VERSION = (\d+)$"),
    ("shared/domain/events.py", r"^SCHEMA_VERSION = (\d+)$"),
]


def newer_build(folder: Path) -> Path:
    """Copy the sources into a folder, with the new statistic."""
    for package in ("services", "shared"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, after in CHANGES:
        source = (folder / name).read_text()
        assert source.count(before) == 1, f"{name} has changed: {before!r}"
        (folder / name).write_text(source.replace(before, after))
    for name, pattern in VERSIONS:
        source, replaced = re.subn(
            pattern,
            lambda match: match[0].replace(match[1], str(int(match[1]) + 1)),
            (folder / name).read_text(),
            flags=re.MULTILINE,
        )
        assert replaced == 1, f"{name} has changed: {pattern}"
        (folder / name).write_text(source)
    return folder


async def told(build: Path, settings: Settings, *arguments: str) -> dict[str, Any]:
    """Run a command of a build with --json; return what it told."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tripfold", *arguments, "--json"),
        cwd=build,
        env=environment_of(settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (out, err)
    response: dict[str, Any] = json.loads(out)
    return response


@contextlib.asynccontextmanager
async def aggregate(build: Path, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Run the aggregate of a build; give a client of its health page once it is ready."""
    port = free_port("an aggregate of a test")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tripfold", "serve", "aggregate"),
        cwd=build,
        env=environment_of(settings) | {"TRIPFOLD_HEALTH_PORT": str(port), "TRIPFOLD_LOG_LEVEL": "error"},
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            await eventually(lambda: _readiness(client, ready=True), "the aggregate to be ready")
            yield client
    finally:
        process.terminate()
        await process.wait()


async def _readiness(client: httpx.AsyncClient, *, ready: bool) -> str | None:
    try:
        response = await client.get("/health/ready")
    except httpx.TransportError:
        return None
    return response.text if (response.status_code == 200) == ready else None


async def live(store: S3Store, country: str) -> dict[str, Any]:
    """Return a live summary of the day as it is stored, whichever build wrote it."""
    pointer = await store.get(keys.CURRENT)
    generation = json.loads(pointer.body)["live"] if pointer else 1
    found = await store.get(keys.summary(generation, DAY, CountrySlug(country)))
    assert found is not None
    summary: dict[str, Any] = json.loads(found.body)
    return summary


@pytest.mark.timeout(300)
async def test_a_new_statistic_is_filled_by_reprocessing(settings: Settings, tmp_path: Path) -> None:
    """Old summaries are read, an older service stops at newer ones, and reprocessing fills the new field."""
    newer = newer_build(tmp_path)
    async with S3Store(settings) as store, KafkaPublisher(settings, source="test") as publisher:
        await store.create_bucket()
        await apply_topics(settings)
        bucket = FakeBucket()
        await bucket.fold(bucket.plan(1, {"armenia": [1, 2], "brasil": [3]}))
        for city, country in ((1, "armenia"), (2, "armenia"), (3, "brasil")):
            await bucket.fold(bucket.store_file(city, city + 10, trips(city), country))
        for key, stored in bucket.store.objects.items():
            await store.put(key, stored.body)
        records = bucket.log.records(Topic.CITY_STATS)
        await publisher.publish(OutgoingEvent(events.decode(record.topic, record.value)) for record in records)
        before = await live(store, "armenia")
        async with aggregate(ROOT, settings) as client:
            reprocessed = await told(newer, settings, "reprocess")
            assert (reprocessed["reprocessed"], reprocessed["refused"]) == (3, 0)
            stuck = await eventually(lambda: _readiness(client, ready=False), "the older aggregate to stop")
            assert "upgrade it" in stuck
            assert await live(store, "armenia") == before
        async with aggregate(newer, settings):

            async def both_counted() -> bool | None:
                found = [await live(store, country) for country in ("armenia", "brasil")]
                return True if [one["totals"].get("late_trips") for one in found] == [1, 2] else None

            await eventually(both_counted, "the newer aggregate to fold what the older one had left")
        rebuilt = await told(newer, settings, "rebuild", "--from", "kafka")
        assert (rebuilt["flipped"], rebuilt["changes"]) == (True, [])
        after = await live(store, "armenia")
        assert after["schema_version"] == before["schema_version"] + 1
        assert after["totals"] == {**before["totals"], "late_trips": 1}
        assert [entry["contribution"]["late_trips"] for entry in after["ledger"].values()] == [0, 1]
        assert (await told(newer, settings, "verify", "--deep"))["differences_total"] == 0
