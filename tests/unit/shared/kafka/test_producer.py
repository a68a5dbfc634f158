"""How a publisher checks Kafka, and how it closes."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaProducer

from shared.kafka import producer
from shared.kafka.producer import CHECK_TIMEOUT_MS, KafkaPublisher, KafkaUnavailable
from shared.runtime.settings import load_settings

HANGS_AFTER_S = 30.0


async def test_the_check_of_a_silent_broker_ends_in_time() -> None:
    """A broker that accepts a connection and sends nothing is unavailable after the given time."""
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        publisher = KafkaPublisher(load_settings({"TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": address}), source="test")
        async with asyncio.timeout(CHECK_TIMEOUT_MS / 1_000 - 5):
            with pytest.raises(KafkaUnavailable, match=address):
                await publisher.check(timeout_ms=50)


class HangingProducer(AIOKafkaProducer):  # type: ignore[misc]  # it has no type information
    """A producer with pending records that the broker does not acknowledge."""

    async def stop(self) -> None:
        await asyncio.Event().wait()


async def test_a_publisher_closes_although_kafka_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for pending records is bounded."""
    monkeypatch.setattr(producer, "CLOSE_TIMEOUT_S", 0.01)
    publisher = KafkaPublisher(load_settings({}), source="test")
    publisher._producer = HangingProducer()
    async with asyncio.timeout(HANGS_AFTER_S):
        await publisher.__aexit__(None, None, None)
