"""Broker outages (stopped, killed, unreachable, hanging) and compaction.

Each test ends with the oracle: the stored, published and served sums are the upstream's.
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
from tests.chaos.relay import NetworkState
from tests.chaos.system import PARTITIONS, System
from tests.chaos.upstream import UpstreamFault
from tests.integration.running import eventually
from tests.kafka.conftest import Tripfold

COMPACT_IMMEDIATELY = {
    "segment.ms": "50",
    "segment.bytes": "1048576",
    "min.cleanable.dirty.ratio": "0.0001",
    "min.compaction.lag.ms": "0",
    "delete.retention.ms": "0",
}


@pytest.mark.parametrize("kill", [False, True])
async def test_a_broker_restart_during_processing_loses_nothing(tripfold: Tripfold, kill: bool) -> None:
    """After a stop or a kill of the broker consumers continue, and the result is exact."""
    date = f"2024-05-{8 + kill:02}"
    tripfold.system.upstream.rates = {UpstreamFault.SLOW: 1.0}
    location = await tripfold.post(date)
    await tripfold.downloads_started(date)
    await tripfold.system.restart_kafka(1.0, kill=kill)
    await tripfold.completed(location)
    await tripfold.ready()
    await tripfold.assert_exact(date)


@pytest.mark.parametrize("network", [NetworkState.DOWN, NetworkState.BLACKHOLED])
async def test_idle_services_are_not_ready_without_kafka_and_recover(tripfold: Tripfold, network: NetworkState) -> None:
    """Idle services are live but not ready without Kafka; when Kafka is back they are ready and consume."""
    system = tripfold.system
    date = f"2024-05-{10 + (network is NetworkState.BLACKHOLED):02}"
    await system.network.set_state(network)
    for name in system.config.services:
        await eventually(partial(_not_ready, system, name), f"{name} to notice that Kafka is {network.value}")
        assert (await system.client.get(f"{system.health_urls[name]}/health/live")).is_success
    await system.network.set_state(NetworkState.OPEN)
    await tripfold.ready()
    await tripfold.completed(await tripfold.post(date))
    await tripfold.assert_exact(date)


async def _not_ready(system: System, name: str) -> bool | None:
    return not await system.ready(name) or None


async def test_a_compacted_topic_rebuilds_the_state(tripfold: Tripfold) -> None:
    """After compaction removed records, a rebuild from the topics gives exactly what the API serves."""
    system, date = tripfold.system, "2024-05-12"
    await _configure(system, COMPACT_IMMEDIATELY)
    for _ in range(3):
        system.upstream.correct(date)
        system.upstream.move()
        await tripfold.completed(await tripfold.post(date))

    async def compacted() -> bool | None:
        # Kafka does not compact the active segment, and only a new record closes it.
        await tripfold.completed(await tripfold.post(date))
        return await _removed_by_compaction(system, "city-stats") > 0 or None

    await eventually(compacted, "compaction", deadline_s=90)
    await tripfold.assert_exact(date)
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
    """Return the number of records that compaction removed: offsets without a record."""
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
