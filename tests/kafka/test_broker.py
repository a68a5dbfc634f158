"""The broker itself: stopped and started in mid-work, killed, unreachable, silent; and its compaction.

Each scenario ends with the oracle: what is stored, logged and served is the upstream's truth.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from shared.kafka.admin import admin_client
from shared.runtime.settings import PREFIX, load_settings
from tests.chaos.relay import Network
from tests.chaos.system import PARTITIONS, System
from tests.chaos.upstream import Mischief
from tests.integration.running import eventually
from tests.kafka.conftest import Tripfold

ROLL_AND_CLEAN_AT_ONCE = {
    "segment.ms": "50",
    "segment.bytes": "1048576",
    "min.cleanable.dirty.ratio": "0.0001",
    "min.compaction.lag.ms": "0",
    "delete.retention.ms": "0",
}


@pytest.mark.parametrize("kill", [False, True])
async def test_a_broker_that_restarts_in_mid_work_loses_nothing(tripfold: Tripfold, kill: bool) -> None:
    """Whether stopped or killed, the broker comes back to consumers that go on, and to an exact result."""
    date = f"2024-05-{8 + kill:02}"
    tripfold.system.upstream.rates = {Mischief.SLOW: 1.0}
    place = await tripfold.post(date)
    await tripfold.under_way(date)
    await tripfold.system.restart_kafka(1.0, kill=kill)
    await tripfold.completed(place)
    await tripfold.ready()
    await tripfold.exact(date)


@pytest.mark.parametrize("network", [Network.AWAY, Network.SILENT])
async def test_idle_services_say_when_kafka_is_away_and_work_when_it_is_back(
    tripfold: Tripfold, network: Network
) -> None:
    """Without any work every service stops being ready while Kafka is away; back again, they are ready, and consume."""
    system = tripfold.system
    date = f"2024-05-{10 + (network is Network.SILENT):02}"
    await system.network.become(network)
    for name in system.shape.services:
        await eventually(partial(_not_ready, system, name), f"{name} to notice that Kafka is {network.value}")
        assert (await system.client.get(f"{system.health_urls[name]}/health/live")).is_success
    await system.network.become(Network.OPEN)
    await tripfold.ready()
    await tripfold.completed(await tripfold.post(date))
    await tripfold.exact(date)


async def _not_ready(system: System, name: str) -> bool | None:
    return not await system.ready(name) or None


async def test_a_compacted_topic_rebuilds_the_state(tripfold: Tripfold) -> None:
    """After compaction really removed records, a new consumer of the topics ends with exactly what is served."""
    system, date = tripfold.system, "2024-05-12"
    await _configure(system, ROLL_AND_CLEAN_AT_ONCE)
    for _ in range(3):
        system.upstream.correct(date)
        system.upstream.move()
        await tripfold.completed(await tripfold.post(date))

    async def compacted() -> bool | None:
        # The active segment is never compacted, and only a new record ends it.
        await tripfold.completed(await tripfold.post(date))
        return await _removed_by_compaction(system, "city-stats") > 0 or None

    await eventually(compacted, "compaction", deadline_s=90)
    await tripfold.exact(date)
    code, output = await system.command("rebuild", "--from", "kafka", "--dry-run", "--json")
    assert code == 0, output
    rebuilt = json.loads(output)
    assert rebuilt["changes_total"] == 0, rebuilt


async def _configure(system: System, configuration: dict[str, str]) -> None:
    prefix = system.environment[f"{PREFIX}TOPIC_PREFIX"]
    async with admin_client(load_settings(system.environment)) as admin:
        for topic in ("city-stats", "country-day-summaries"):
            resource = ConfigResource(
                ConfigResourceType.TOPIC, prefix + topic, {"cleanup.policy": "compact", **configuration}
            )
            await admin.alter_configs([resource])


async def _removed_by_compaction(system: System, topic: str) -> int:
    """Count the records that compaction has removed: offsets at which there is none."""
    name = system.environment[f"{PREFIX}TOPIC_PREFIX"] + topic
    consumer = AIOKafkaConsumer(bootstrap_servers=system.kafka_address, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partitions = [TopicPartition(name, number) for number in range(PARTITIONS)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        records = 0
        async with asyncio.timeout(30):
            while any([await consumer.position(one) < ends[one] for one in partitions]):
                records += sum(map(len, (await consumer.getmany(timeout_ms=200)).values()))
        return int(sum(ends.values())) - records
    finally:
        await consumer.stop()
