"""Reading committed offsets while Kafka makes its topic for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError

from shared.kafka import group_offsets
from shared.kafka.group_offsets import committed_offsets
from shared.runtime.retry import DependencyUnavailable

PARTITION = TopicPartition("city-stats", 0)


class NewCluster:
    """Kafka without its topic of offsets: it refuses so many requests."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals

    async def list_consumer_group_offsets(
        self, _group: str, *, partitions: list[TopicPartition]
    ) -> dict[TopicPartition, SimpleNamespace]:
        """Return the same offset for each partition."""
        if self.refusals:
            self.refusals -= 1
            raise GroupCoordinatorNotAvailableError
        return {one: SimpleNamespace(offset=7) for one in partitions}


def kafka(refusals: int) -> AIOKafkaAdminClient:
    """Return a client of a new cluster."""
    return cast(AIOKafkaAdminClient, NewCluster(refusals))


async def test_a_new_cluster_gets_time_to_make_its_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are repeated until there is a coordinator."""
    monkeypatch.setattr(group_offsets, "COORDINATOR_INTERVAL_S", 0)
    assert await committed_offsets(kafka(3), "group", [PARTITION]) == {PARTITION: 7}


async def test_a_cluster_that_cannot_make_its_topic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is bounded, and the error names the topic and the setting."""
    monkeypatch.setattr(group_offsets, "COORDINATOR_WAIT_MAX_S", 0.0)
    monkeypatch.setattr(group_offsets, "COORDINATOR_INTERVAL_S", 0)
    with pytest.raises(DependencyUnavailable, match=r"__consumer_offsets.*offsets\.topic\.replication\.factor"):
        await committed_offsets(kafka(1_000_000), "group", [PARTITION])
