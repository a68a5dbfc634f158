"""Rebuilds against Kafka and S3: killed, stopped, concurrent, with readers, and after the loss of Kafka.

The fault model of the first test: a rebuild is killed (SIGKILL) several times in a row at random moments, or stopped
(SIGSTOP) for any time. TRIPFOLD_TEST_KILLS sets the number of kills, and TRIPFOLD_TEST_SEED the seed. A failure prints
both.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import AdminClient

from services.aggregate.replay.rebuild import Rebuild
from services.aggregate.replay.topic_reader import FETCH_BYTES_MAX, KafkaTopicReader, RawRecord
from shared.domain import events, keys, objects
from shared.domain.contribution import Contribution, total_of
from shared.domain.events import Event
from shared.domain.objects import GenerationPointer, Summary
from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.concurrency import bounded_map
from shared.runtime.settings import Settings
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectStore
from shared.storage.s3 import S3Store
from tests.fakes.bucket import DAY, FakeBucket, trips
from tests.integration.commands import run_json, started, tripfold
from tests.integration.conftest import isolated_settings
from tests.integration.faults import FAULT, RELEASED, hold_rebuild
from tests.integration.running import Running, eventually, running
from tests.integration.trips import OTHER_DATE, TRIPS
from tests.integration.upstream import UpstreamServer
from tripfold.local import supervisor
from tripfold.local.embedded import EmbeddedServices

KILLS = int(os.environ.get("TRIPFOLD_TEST_KILLS", "2"))
SEED = int(os.environ.get("TRIPFOLD_TEST_SEED", "20240501"))
DATES = [dt.date(2023, 1, 1) + dt.timedelta(days=day) for day in range(4)]
COMPACTED = (Topic.CITY_STATS, Topic.COUNTRY_DAY_SUMMARIES)


async def filled(store: ObjectStore) -> FakeBucket:
    """Fill a bucket with a history of DATES, as services leave it; on each date a city was corrected."""
    bucket = FakeBucket()
    for number, date in enumerate(DATES):
        await bucket.fold(bucket.plan(1, {"armenia": [1, 2], "brasil": [3], "chad": [4]}, date))
        for city, country in ((1, "armenia"), (2, "armenia"), (3, "brasil"), (4, "chad")):
            await bucket.fold(bucket.store_file(city, 10, trips(number + city), country, date))
        await bucket.fold(bucket.store_file(1, 20, trips(number + 5), "armenia", date))
    stored = list(bucket.store.objects.items())
    await bounded_map(lambda item: store.put(item[0], item[1].body), stored, limit=16)
    return bucket


async def summaries(store: ObjectStore) -> dict[str, bytes]:
    """Return the bytes of all live summaries, by the rest of their keys."""
    prefix = keys.summaries_of_generation((await read_current(store)).live)
    listed = [one.key async for one in store.list(prefix)]
    found = await bounded_map(store.get, listed, limit=16)
    return {key.removeprefix(prefix): one.body for key, one in zip(listed, found, strict=True) if one is not None}


async def last_records(settings: Settings) -> dict[tuple[Topic, bytes | None], bytes | None]:
    """Return the last record of each key of the compacted topics, which compaction keeps."""
    kept: dict[tuple[Topic, bytes | None], bytes | None] = {}
    for topic in COMPACTED:
        replay = KafkaTopicReader(settings, topic)
        try:
            await replay.take_end()
            async for batch in replay.read():
                kept |= {(topic, record.key): record.value for record in batch}
        finally:
            await replay.close()
    return kept


def held(folder: Path) -> dict[str, str]:
    """Return the variables with which a rebuild waits, before it compares the generations, for a file ``released``."""
    return {FAULT: hold_rebuild.__name__, RELEASED: str(folder / "released")}


async def building(store: ObjectStore, after: int) -> GenerationPointer:
    """Wait until a generation after number ``after`` is being built, or was built if nothing holds its rebuild."""

    async def look() -> GenerationPointer | None:
        current = await read_current(store)
        return current if current.highest > after else None

    return await eventually(look, "a rebuild to begin")


async def _published(publisher: KafkaPublisher, bucket: FakeBucket, random: Random) -> list[Event]:
    """Publish every record of the history three times, in random order; return their events."""
    published: list[Event] = [
        events.decode(record.topic, record.value) for record in bucket.log.records(Topic.CITY_STATS) * 3
    ]
    random.shuffle(published)
    await publisher.publish(map(OutgoingEvent, published))
    return published


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[tuple[S3Store, KafkaPublisher]]:
    """Provision the bucket and topics of a test, and open both."""
    async with S3Store(settings) as store, KafkaPublisher(settings, source="test") as publisher:
        await store.create_bucket()
        await apply_topics(settings)
        yield store, publisher


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_an_interrupted_rebuild_restores_the_pointer(
    settings: Settings, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """A rebuild that Ctrl-C or a supervisor ends keeps the live generation, and the next one need not take over."""
    async with opened(settings) as (store, _):
        await filled(store)
        right = await summaries(store)
        with started(settings, "rebuild", "--from", "s3", variables=held(tmp_path)) as command:
            await building(store, 1)
            command.signal(number)
            ended = await command.ended()
        assert (ended.code, "Traceback" in ended.err) == (code, False), ended.err
        assert await read_current(store) == GenerationPointer(live=1, highest=2)
        assert await summaries(store) == right
        assert (await run_json(settings, "rebuild", "--from", "s3"))[0] == 0


async def test_a_record_larger_than_a_fetch_is_read_whole(settings: Settings) -> None:
    """A record that is longer than one fetch is read whole, and in its place among the others."""
    await apply_topics(settings)
    values = [b"1" * size for size in (10, 3 * FETCH_BYTES_MAX, 10, FETCH_BYTES_MAX, 10)]
    async with KafkaPublisher(settings, source="test") as publisher:
        for value in values:
            await publisher.publish_record(Topic.CITY_STATS, key=b"2024-05-01/armenia/1", value=value, headers=())
    replay = KafkaTopicReader(settings, Topic.CITY_STATS)
    try:
        assert await replay.take_end() == len(values)
        assert [value async for batch in replay.read_raw() for _, value, _, _ in batch] == values
    finally:
        await replay.close()


@pytest.mark.timeout(300)
async def test_a_rebuild_that_is_killed_changes_nothing(settings: Settings) -> None:
    """However often a rebuild is killed, live numbers stay, and its topic ends with the records of the bucket."""
    random = Random(SEED)
    async with opened(settings) as (store, publisher):
        bucket = await filled(store)
        right = await summaries(store)
        assert len(right) == 3 * len(DATES)
        published = await _published(publisher, bucket, random)
        for number in range(KILLS):
            highest = (await read_current(store)).highest
            with started(settings, "rebuild", "--take-over", "--from", random.choice(["s3", "kafka"])) as command:
                await building(store, highest)
                await asyncio.sleep(random.uniform(0, 0.3))
                command.signal(signal.SIGKILL)
                await command.ended()
            assert await summaries(store) == right, f"after kill {number} of {KILLS}, seed {SEED}"
        code, rebuilt = await run_json(settings, "rebuild", "--from", "s3", "--take-over")
        assert (code, rebuilt["changes"]) == (0, [])
        assert await summaries(store) == right
        await _stale_topic(settings, publisher, published)


@pytest.mark.parametrize("remedy", ["take over", "abandon"])
async def test_an_operator_clears_the_mark_of_a_killed_rebuild(settings: Settings, tmp_path: Path, remedy: str) -> None:
    """A rebuild that finds the mark of a killed one is refused and names both remedies; either works."""
    async with opened(settings) as (store, _):
        await filled(store)
        right = await summaries(store)
        with started(settings, "rebuild", "--from", "s3", variables=held(tmp_path)) as command:
            await building(store, 1)
            command.signal(signal.SIGKILL)
            assert (await command.ended()).code == -signal.SIGKILL
        code, _, err = await tripfold(settings, "rebuild", "--from", "s3")
        assert (code, "--take-over" in err, "tripfold rebuild --abandon" in err) == (1, True, True), err
        if remedy == "take over":
            assert (await run_json(settings, "rebuild", "--from", "s3", "--take-over"))[0] == 0
        else:
            code, out, _ = await tripfold(settings, "rebuild", "--abandon")
            assert (code, "Cleared the mark of the rebuild into generation 2" in out) == (0, True), out
            assert await read_current(store) == GenerationPointer(live=1, highest=2)
            assert (await run_json(settings, "rebuild", "--from", "s3"))[0] == 0
        assert await read_current(store) == GenerationPointer(live=3, highest=3)
        assert await summaries(store) == right


class _HeldTopicReader:
    """An empty topic whose end is reached once it is released."""

    def __init__(self) -> None:
        self.released = asyncio.Event()

    async def take_end(self) -> int:
        return 0

    async def read_raw(self) -> AsyncIterator[Sequence[RawRecord]]:
        await self.released.wait()
        yield ()


async def test_one_of_racing_rebuilds_completes(settings: Settings, tmp_path: Path) -> None:
    """A second rebuild is refused or takes over; the one that completes ends with the numbers that were live.

    The topic that it reads holds every record three times, in random order.
    """
    async with opened(settings) as (store, publisher):
        bucket = await filled(store)
        right = await summaries(store)
        await _published(publisher, bucket, Random(SEED))
        await _two_at_once(settings, store, publisher)
        await _a_zombie(settings, store, tmp_path)
        assert await summaries(store) == right
        assert (await run_json(settings, "verify"))[0] == 0


async def _two_at_once(settings: Settings, store: S3Store, publisher: KafkaPublisher) -> None:
    highest = (await read_current(store)).highest
    replay = _HeldTopicReader()
    first = Rebuild(store, publisher, token="first", report=lambda *_: None, reader=replay)
    rebuilding = asyncio.create_task(first.run())
    await building(store, highest)
    code, _, err = await tripfold(settings, "rebuild", "--from", "s3")
    assert (code, "--take-over" in err) == (1, True), err
    assert (await read_current(store)).token == "first"
    replay.released.set()
    assert (await rebuilding).flipped
    assert (await read_current(store)) == GenerationPointer(live=highest + 1, highest=highest + 1)


async def _a_zombie(settings: Settings, store: ObjectStore, folder: Path) -> None:
    highest = (await read_current(store)).highest
    with started(settings, "rebuild", "--from", "s3", variables=held(folder)) as zombie:
        await building(store, highest)
        zombie.signal(signal.SIGSTOP)
        code, rebuilt = await run_json(settings, "rebuild", "--from", "kafka", "--take-over")
        assert (code, rebuilt["flipped"], rebuilt["changes"]) == (0, True, [])
        (folder / "released").touch()
        zombie.signal(signal.SIGCONT)
        ended = await zombie.ended()
        assert (ended.code, "another rebuild took over" in ended.err) == (1, True), ended.err
    assert (await read_current(store)) == GenerationPointer(live=highest + 2, highest=highest + 2)


async def _stale_topic(settings: Settings, publisher: KafkaPublisher, published: Sequence[Event]) -> None:
    """Append an older record of one key to the topic; the audit must find it and republishing must correct it."""
    stale = next(
        event
        for event in published
        if isinstance(event, events.CityDayStats) and event.key.endswith("armenia/1") and event.revision == 10
    )
    code, _ = await run_json(settings, "republish")
    assert code == 0
    await publisher.publish([OutgoingEvent(stale)])
    code, verified = await run_json(settings, "verify", "--topics", "--from", str(stale.date), "--to", str(stale.date))
    assert code == 1
    assert [(one["key"], one["what"]) for one in verified["differences"]] == [(stale.key, "last record")]
    code, _ = await run_json(settings, "republish", "--from", str(stale.date), "--to", str(stale.date))
    assert code == 0
    code, verified = await run_json(settings, "verify", "--topics")
    assert (code, verified["differences_total"]) == (0, 0)


@pytest.mark.timeout(300)
async def test_rebuilds_run_beside_readers_and_writers_and_after_a_loss_of_kafka(
    embedded: EmbeddedServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flip to a generation with other numbers shows readers one whole generation, and keeps newly ingested numbers.

    Kafka loses all topics and offsets: a rebuild from S3 gives the same bytes, fills the topics with the same records,
    and the services go on.
    """
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", 60.0)  # a killed consumer would stay in its group
    with UpstreamServer() as upstream:
        for city, country in ((1, "Armenia"), (2, "Armenia"), (3, "Brasil")):
            upstream.add_city(city, f"City {city}", country)
            upstream.put(city, str(DAY), TRIPS[: city * 10])
            upstream.put(city, OTHER_DATE, TRIPS[:5])
        # Consumers without a name leave their group when they end, so that its offsets can be deleted.
        settings = isolated_settings(embedded, UPSTREAM_URL=upstream.url, KAFKA_GROUP_INSTANCE_ID="")
        async with running(settings, tmp_path) as services:
            await filled(services.store)
            await _overstate(services.store)
            assert (await services.process(str(DAY)))["status"] == "completed"
            await _flip_under_load(services, upstream)
        async with S3Store(settings) as store:
            await _lose_kafka(settings, store)
        async with running(settings, tmp_path) as services:
            assert (await services.process(OTHER_DATE))["status"] == "completed"
            assert (await services.stats(OTHER_DATE))["armenia"][OTHER_DATE]["bus_count"] == 10
            assert (await run_json(settings, "verify", "--deep"))[0] == 0


async def _overstate(store: S3Store) -> None:
    """Add a million to every number of each live summary, and leave its ledger unchanged."""

    async def overstate(key: str) -> None:
        found = await store.get(key)
        assert found is not None
        summary = objects.decode(Summary, found.body, key)
        million = Contribution(trips=10**6, passengers=10**6, accidents=10**6, delay_total_ms=10**6)
        await store.put(
            key, objects.encode(msgspec.structs.replace(summary, totals=total_of([summary.totals, million])))
        )

    listed = [one.key async for one in store.list(keys.summaries_of_generation(1))]
    await bounded_map(overstate, listed, limit=16)


async def _flip_under_load(services: Running, upstream: UpstreamServer) -> None:
    span = (str(DATES[0]), str(DATES[-1]))
    wrong = await services.stats(*span)
    responses: list[dict[str, Any]] = []
    done = asyncio.Event()

    async def ask() -> None:
        while not done.is_set():
            responses.append(await services.stats(*span))

    async def asked() -> bool | None:
        return bool(responses) or None

    asking = [asyncio.create_task(ask()) for _ in range(2)]
    await eventually(asked, "a response before the flip")
    upstream.put(1, str(DAY), TRIPS)
    correcting = asyncio.create_task(services.process(str(DAY)))
    code, rebuilt = await run_json(services.settings, "rebuild", "--from", "s3")
    assert (code, rebuilt["flipped"]) == (0, True), rebuilt
    right = await services.stats(*span)
    done.set()
    await asyncio.gather(*asking)
    assert (await correcting)["status"] == "completed"
    days = [day for of_country in right.values() for day in of_country.values()]
    assert len(days) == 3 * len(DATES)
    assert all(day["bus_count"] < 100 for day in days)
    flips = [response == right for response in responses]
    assert all(response in (wrong, right) for response in responses), "a response mixed two generations"
    assert (flips[0], wrong == right) == (False, False)
    assert (await services.stats(str(DAY)))["armenia"][str(DAY)]["bus_count"] == 70
    assert (await run_json(services.settings, "verify", "--deep"))[0] == 0
    assert (await run_json(services.settings, "verify", "--topics"))[0] == 0


async def _lose_kafka(settings: Settings, store: S3Store) -> None:
    right, kept = await summaries(store), await last_records(settings)
    await asyncio.to_thread(_delete_topics_and_offsets, settings)
    code, _, err = await tripfold(settings, "verify", "--topics")
    assert (code, "tripfold topics apply" in err) == (1, True), err
    code, _, err = await tripfold(settings, "topics", "apply")
    assert code == 0, err
    assert await last_records(settings) == {}
    code, rebuilt = await run_json(settings, "rebuild", "--from", "s3")
    assert (code, rebuilt["changes_total"]) == (0, 0)
    assert await summaries(store) == right
    assert await last_records(settings) == kept
    assert (await run_json(settings, "verify", "--topics"))[0] == 0


def _delete_topics_and_offsets(settings: Settings) -> None:
    client = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    names = [name for name in client.list_topics(timeout=10).topics if name.startswith(settings.topic_prefix)]
    assert len(names) == len(Topic)
    groups = [
        group.group_id
        for group in client.list_consumer_groups().result().valid
        if group.group_id.startswith(settings.topic_prefix)
    ]
    assert groups
    for deleted in (client.delete_consumer_groups(groups), client.delete_topics(names, operation_timeout=10)):
        for future in deleted.values():
            future.result()
