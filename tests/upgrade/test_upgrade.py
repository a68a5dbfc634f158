"""Upgrade, roll back and upgrade again: two builds on one bucket and one Kafka, under load.

``make test-upgrade`` runs these tests. TRIPFOLD_TEST_SEED repeats the order of a run, up to the timing of the machine.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from services.aggregate.replay.topic_reader import KafkaTopicReader
from shared.domain import keys
from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.runtime.settings import Settings
from shared.storage.s3 import S3Store
from tests import ROOT
from tests.integration.running import eventually
from tests.integration.upstream import UpstreamServer
from tests.upgrade.builds import newer_build, run_json
from tests.upgrade.system import DATES, SERVICES, Load, System, running_system

SEED_VARIABLE = "TRIPFOLD_TEST_SEED"


class Upgrade(msgspec.Struct, frozen=True):
    """A system under load, and the order in which its services are replaced."""

    system: System
    load: Load
    settings: Settings
    draw: random.Random

    async def move_to(self, build: Path) -> None:
        """Replace all services in a random order, under load. Then all numbers are exact, and the build agrees."""
        async with self.load.going_on():
            for name in self.draw.sample(list(SERVICES), len(SERVICES)):
                await self.system.replace(name, build)
        await self.all_is_well(build)

    async def all_is_well(self, build: Path) -> None:
        """Check every number, the bucket, the topics and the dead letters, with the commands of a build."""
        query = {"from": DATES[0], "to": DATES[-1]}
        assert (await self.system.client.get("/country-stats", params=query)).json() == self.load.figures()
        assert (await run_json(build, self.settings, "verify", "--deep"))["differences_total"] == 0
        assert (await run_json(build, self.settings, "verify", "--topics"))["differences_total"] == 0
        dead = KafkaTopicReader(self.settings, Topic.DEAD_LETTERS)
        try:
            assert await dead.take_end() == 0
        finally:
            await dead.close()
        for name in SERVICES:
            assert "upgrade it" not in self.system.log(name).read_text()


@pytest.fixture
async def upgrade(settings: Settings, tmp_path: Path) -> AsyncIterator[Upgrade]:
    """Return a system without processes on a new bucket and new topics. The order of the services is random."""
    seed = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(1 << 30))
    print(f"{SEED_VARIABLE}={seed}")  # noqa: T201  # pytest shows it when a test fails
    with UpstreamServer(etags=True) as upstream:
        settings = settings.model_copy(update={"upstream_url": upstream.url})
        await apply_topics(settings)
        async with running_system(settings, tmp_path) as system:
            yield Upgrade(system, Load(system, upstream, seed), settings, random.Random(seed))


async def written(store: S3Store) -> list[bytes]:
    """Return the bodies of all manifests and live summaries."""
    listed = [one.key for prefix in (keys.MANIFESTS, keys.SUMMARIES) async for one in store.list(prefix)]
    found = [await store.get(key) for key in listed]
    return [one.body for one in found if one is not None]


async def _refused(system: System) -> bool | None:
    return "upgrade it" in (await system.readiness("aggregate", ready=False) or "") or None


async def test_a_newer_schema_version_waits_for_its_switch(upgrade: Upgrade, tmp_path: Path) -> None:
    """A build with a new statistic writes it only after the switch. Until then this build can return.

    After the switch, an aggregate of this build that was forgotten stops, and the newer one folds what it left. Stored
    files are reprocessed, and the new statistic is exact.
    """
    newer = newer_build(tmp_path / "newer")
    settings, system = upgrade.settings, upgrade.system
    async with S3Store(settings) as store:
        await store.create_bucket()
        for build in (ROOT, newer, ROOT, newer):
            await upgrade.move_to(build)
            assert not any(b"late_trips" in body or b'"schema_version":1,' not in body for body in await written(store))
        await system.replace("aggregate", ROOT)
        finalized = await run_json(newer, settings, "upgrade", "finalize")
        assert (finalized["written_before"], finalized["written"]) == (1, 2)
        await eventually(partial(_refused, system), "the older aggregate to stop")
        await system.replace("aggregate", newer)
        dates = {"from": DATES[0], "to": DATES[-1], "source": "bucket"}
        backfill = await system.client.post("/backfills", params=dates)
        location = backfill.headers["location"]
        await eventually(lambda: upgrade.load.ended(location), "the files to be reprocessed")
        async with upgrade.load.going_on():
            pass
        assert (await run_json(newer, settings, "verify", "--deep"))["differences_total"] == 0
        assert (await run_json(newer, settings, "verify", "--topics"))["differences_total"] == 0
        rebuilt = await run_json(newer, settings, "rebuild", "--from", "kafka")
        assert (rebuilt["flipped"], rebuilt["changes"]) == (True, [])
        manifests = [json.loads(body) for body in await written(store) if b'"raw_key"' in body]
    late = {(one["city_id"], one["date"]): one["contribution"]["late_trips"] for one in manifests}
    assert late == {
        (str(city), date): sum(trip["delay"] != "PT0S" for trip in trips)
        for (city, date), trips in upgrade.load.files.items()
    }
    assert {one["schema_version"] for one in manifests} == {2}
