"""The consumers of the ingest service."""

from __future__ import annotations

from typing import Any

import pytest

from services.ingest import app
from shared.domain.topics import Topic
from shared.kafka.consumer import consume
from shared.kafka.subscription import Subscription
from shared.runtime.settings import load_settings


def test_a_backlog_is_processed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planner and worker take records of all partitions alike, so no request in a backlog waits for all others."""
    in_turns = set()

    def noted(broker: Any, topic: Topic, process: Any, **options: Any) -> Subscription:
        if options.get("in_turns"):
            in_turns.add(topic)
        return consume(broker, topic, process, **options)

    monkeypatch.setattr(app, "consume", noted)
    app.create_app(load_settings({"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}))
    assert in_turns == {Topic.PROCESS_REQUESTS, Topic.CITY_TASKS, Topic.BACKGROUND_TASKS}
