"""The offsets of the consumer groups, as a real broker tells them."""

from __future__ import annotations

import datetime as dt
from functools import partial

import pytest

from shared.domain.events import ProcessRequested
from shared.domain.ids import mint_request_id, utc_now
from shared.domain.topics import GROUPS, Topic
from shared.kafka.admin import apply_topics
from shared.kafka.group_offsets import GroupOffsets, read_group_offsets
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings
from tests.integration.consuming import Collector, consuming
from tests.integration.running import eventually

RECORDS = 3


async def of_requests(settings: Settings) -> GroupOffsets:
    """Return the offsets of the group that consumes requests."""
    (found,) = [one for one in await read_group_offsets(settings) if one.topic is Topic.PROCESS_REQUESTS]
    return found


async def test_the_lag_is_what_the_group_has_not_committed(settings: Settings) -> None:
    """Without a consumer all records count as lag; once they are handled, none does, and they are committed."""
    await apply_topics(settings)
    assert {one.topic for one in await read_group_offsets(settings)} == GROUPS.keys()
    now = utc_now()
    dates = [dt.date(2024, 5, day) for day in range(1, RECORDS + 1)]
    requests = [ProcessRequested(request_id=mint_request_id(now), date=date, requested_at=now) for date in dates]
    async with KafkaPublisher(settings, source="test") as publisher:
        await publisher.publish(map(OutgoingEvent, requests))
    before = await of_requests(settings)
    assert (before.lag, before.committed, before.members or 0) == (RECORDS, 0, 0)
    collector = Collector()
    async with consuming(settings, Topic.PROCESS_REQUESTS, collector, group=GROUPS[Topic.PROCESS_REQUESTS]):
        await eventually(partial(collector.has, RECORDS), "the requests")

        async def committed() -> GroupOffsets | None:
            found = await of_requests(settings)
            return None if found.lag else found

        after = await eventually(committed, "the commit")
    assert (after.committed, after.members) == (RECORDS, 1)


async def test_a_missing_broker_is_an_outage(settings: Settings) -> None:
    """Without Kafka the offsets cannot be read, and the error says so without names of a library."""
    nowhere = settings.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})
    with pytest.raises(DependencyUnavailable, match=r"Kafka at 127\.0\.0\.1:1 "):
        await read_group_offsets(nowhere)
