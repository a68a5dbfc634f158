"""How a service starts, and how it stops."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock

import pytest
from aiokafka.errors import KafkaConnectionError
from faststream.kafka import KafkaBroker

from shared import service
from shared.kafka.consumer import make_broker
from shared.kafka.producer import CHECK_TIMEOUT_MS
from shared.runtime.settings import load_settings
from shared.service import ServiceContext, make_app, start_consumers

HANGS_AFTER_S = 30.0


class HangingBroker(KafkaBroker):
    """A connection to a broker that is frozen: leaving the group gets no response."""

    async def stop(self, *_: Any) -> None:
        await asyncio.Event().wait()


class Consumer:
    """A subscription whose group is balanced once all members have joined."""

    def __init__(self, group: asyncio.Barrier, *, refused: bool = False) -> None:
        self._group = group
        self._refused = refused
        self.starts = 0
        self.consuming = False

    async def begin(self) -> None:
        self.starts += 1
        await self._group.wait()
        if self._refused:
            self._refused = False
            raise KafkaConnectionError
        self.consuming = True


async def test_consumers_start_at_the_same_time() -> None:
    """No consumer waits for another one to start, and only those that failed are started again."""
    group = asyncio.Barrier(3)
    consumers = [Consumer(group), Consumer(group, refused=True), Consumer(group)]
    async with asyncio.timeout(HANGS_AFTER_S):
        with pytest.raises(KafkaConnectionError):
            await start_consumers(make_broker(load_settings({})), consumers)  # type: ignore[arg-type]  # the part that is used
        assert [one.consuming for one in consumers] == [True, False, True]
        consumers[1]._group = asyncio.Barrier(1)
        await start_consumers(make_broker(load_settings({})), consumers)  # type: ignore[arg-type]  # the part that is used
    assert [(one.consuming, one.starts) for one in consumers] == [(True, 1), (True, 2), (True, 1)]


async def test_a_silent_kafka_is_a_fault_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that waits for Kafka says so long before a command would give up."""
    monkeypatch.setattr(service, "PROBE_TIMEOUT_MS", 50)
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        context = ServiceContext(load_settings({"TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": address}), source="test")
        monkeypatch.setattr(context, "check_bucket", AsyncMock())
        app = make_app(context, KafkaBroker(), parts=(), subscriptions=(), publishes=())
        messages = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> dict[str, str]:
            message = next(messages)
            while message == "lifespan.shutdown" and "kafka" not in context.health.faults:  # noqa: ASYNC110  # no event
                await asyncio.sleep(0.001)
            return {"type": message}

        async with asyncio.timeout(CHECK_TIMEOUT_MS / 1_000 - 5):
            await app({"type": "lifespan"}, receive, AsyncMock())
    assert address in context.health.faults["kafka"]


async def test_a_service_stops_although_kafka_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for consumers to leave their group is bounded, so an orchestrator does not kill the process."""
    monkeypatch.setattr(service, "DISCONNECT_TIMEOUT_S", 0.01)
    nowhere = {
        "TRIPFOLD_S3_ENDPOINT_URL": "http://127.0.0.1:9",
        "TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9",
    }
    context = ServiceContext(load_settings(nowhere), source="test")
    app = make_app(context, HangingBroker(), parts=(), subscriptions=(), publishes=())
    sent: list[str] = []

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.startup" if not sent else "lifespan.shutdown"}

    async def send(message: dict[str, str]) -> None:
        sent.append(message["type"])

    async with asyncio.timeout(HANGS_AFTER_S):
        await app({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
