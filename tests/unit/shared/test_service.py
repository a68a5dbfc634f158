"""How a service stops."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from faststream.kafka import KafkaBroker

from shared import service
from shared.runtime.settings import load_settings
from shared.service import ServiceContext, make_app

HANGS_AFTER_S = 30.0


class HangingBroker(KafkaBroker):
    """A connection to a broker that is frozen: leaving the group gets no response."""

    async def stop(self, *_: Any) -> None:
        await asyncio.Event().wait()


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
