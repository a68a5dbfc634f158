"""How a publisher closes."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaProducer

from shared.kafka import producer
from shared.kafka.producer import KafkaPublisher
from shared.runtime.settings import load_settings

HANGS_AFTER_S = 30.0


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
