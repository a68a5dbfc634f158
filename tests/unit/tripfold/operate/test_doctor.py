"""The doctor: what it finds fault with, over fakes that are at fault."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
from pathlib import Path

import pytest
from rich.console import Console

from services.aggregate.replay.generations import begin, watch_rebuild
from shared.domain import keys, objects, schema
from shared.domain.objects import BucketEpoch
from shared.domain.topics import Topic
from shared.kafka import skip_markers
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from shared.runtime.settings import Settings
from shared.storage.generation_pointer import trust_change_counters
from shared.storage.object_store import CasConflict
from tests.fakes.bucket import NOON, FakeBucket, trips
from tests.fakes.log import MemoryTopicReader
from tests.fakes.metrics import REGISTRY
from tests.fakes.store import MemoryStore
from tripfold.operate.doctor import (
    NEEDS,
    Check,
    CheckFailed,
    check_api_keys,
    check_compare_and_swap,
    check_dead_letters,
    check_rebuild_mark,
    check_revisions,
    check_schema_version,
    newer_records,
    records_of,
    run_checks,
)


class Careless(MemoryStore):
    """Looks at the ETag too early, as a store does whose check and write are two steps."""

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        stored = self.objects.get(key)
        if (stored.etag if stored else None) != etag:
            raise CasConflict(key)
        await self.get(key)
        return self.write(key, body)


class Forgetful(MemoryStore):
    """Loses the answer to every write that it makes, so that its writer tries again and is told it lost."""

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        await super().compare_and_swap(key, body, etag=etag)
        raise CasConflict(key)


async def test_a_store_that_compares_and_swaps_passes() -> None:
    """Exactly one concurrent write succeeds, and the check leaves no probe behind."""
    store = FakeBucket().store
    before = dict(store.objects)
    assert "in each of 6 rounds" in await check_compare_and_swap(store)
    assert store.objects == before


async def test_a_store_with_two_winners_of_a_race_fails() -> None:
    """A store that lets several racing writers win is told unfit, and no probe is left behind."""
    store = Careless(lambda: NOON)
    with pytest.raises(CheckFailed, match="4 of 4 concurrent conditional writes"):
        await check_compare_and_swap(store)
    assert store.objects == {}


async def test_a_write_whose_response_was_lost_counts_as_won() -> None:
    """A writer that succeeds without hearing of it still counts as the one winner."""
    await check_compare_and_swap(Forgetful(lambda: NOON))


async def test_an_old_mark_of_a_rebuild_is_reported() -> None:
    """The mark of a rebuild passes while it is young; after an hour its rebuild has probably died."""
    bucket = FakeBucket()
    assert await check_rebuild_mark(bucket.store) == "no rebuild is marked"
    await begin(bucket.store, "dead", take_over=False)
    assert "has not ended" in await check_rebuild_mark(bucket.store)
    bucket.clock.advance(3_601)
    with pytest.raises(CheckFailed, match="3601 s ago"):
        await check_rebuild_mark(bucket.store)


async def test_the_metric_shows_the_age_of_a_rebuild() -> None:
    """The metric of an aggregate is the age of the rebuild that is marked, and 0 once it has ended."""
    bucket = FakeBucket()
    await begin(bucket.store, "dead", take_over=False)
    bucket.clock.advance(100)
    retrier = Retrier(health=Health(), wait_max_s=1)
    watching = asyncio.create_task(watch_rebuild(bucket.store, retrier))
    async with asyncio.timeout(30):
        while REGISTRY.get_sample_value("tripfold_rebuild_age_seconds") != 100:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)
    watching.cancel()


async def test_a_restored_backup_is_reported() -> None:
    """A topic with a revision that the bucket would mint again is told, by the object and the revision."""
    bucket = FakeBucket()
    bucket.store.write(keys.BUCKET_EPOCH, objects.encode(BucketEpoch(revision_floor=5, born_at=NOON)))
    await bucket.fold([*bucket.plan(5, {"armenia": [1]}), *bucket.store_file(1, 10, trips(1))])
    backup = dict(bucket.store.objects)
    records = bucket.log.records(Topic.CITY_STATS)
    records += [bucket.record_of(event) for event in bucket.plan(5, {"armenia": [1]})]
    assert "would repeat none" in await check_revisions(bucket.store, MemoryTopicReader(lambda: records))
    records += [bucket.record_of(event) for event in bucket.store_file(1, 11, trips(2))]
    assert "would repeat none" in await check_revisions(bucket.store, MemoryTopicReader(lambda: records))
    bucket.store.objects = backup
    with pytest.raises(CheckFailed, match=r"city=1\.json has revision 11 in the topic"):
        await check_revisions(bucket.store, MemoryTopicReader(lambda: records))
    bucket.store.write(keys.BUCKET_EPOCH, objects.encode(BucketEpoch(revision_floor=12, born_at=NOON)))
    assert "would repeat none" in await check_revisions(bucket.store, MemoryTopicReader(lambda: records))


async def test_a_record_of_a_later_version_is_named_until_it_is_skipped() -> None:
    """The record that blocks a consumer is named by its place; it says nothing against the lineage."""
    bucket = FakeBucket()
    bucket.log.append(Topic.CITY_STATS, b"k", b'{"type":"unknown-thing","schema_version":1}')
    newer = bucket.log.append(Topic.CITY_STATS, b"k", b'{"type":"forecast","schema_version":2}')
    records = bucket.log.records(Topic.CITY_STATS)
    (told,) = await newer_records(bucket.store, MemoryTopicReader(lambda: records))
    assert f"partition {newer.partition}, offset {newer.offset} of city-stats has type 'forecast'" in told
    await check_revisions(bucket.store, MemoryTopicReader(lambda: records))
    await skip_markers.mark(bucket.store, newer, NOON)
    assert await newer_records(bucket.store, MemoryTopicReader(lambda: records)) == []


async def test_an_upgrade_that_is_not_finalized_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the schema version names the command that ends an upgrade, and fails for a bucket of a later one."""
    store = MemoryStore(lambda: NOON)
    assert "change index yet" in await check_schema_version(store)
    await trust_change_counters(store)
    assert (await check_schema_version(store)).endswith("the latest of this build")
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    assert "tripfold upgrade finalize" in await check_schema_version(store)
    store.write(keys.SCHEMA_SWITCH, b'{"schema_version":3}')
    with pytest.raises(CheckFailed, match="upgrade it"):
        await check_schema_version(store)


async def test_unreachable_dependencies_are_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check fails with a sentence while S3, Kafka and upstream are away, and says which to repair first."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    settings = Settings(
        s3_endpoint_url="http://127.0.0.1:1", kafka_bootstrap_servers="127.0.0.1:1", upstream_url="http://127.0.0.1:1"
    )
    found = {one.what: one async for one in run_checks(settings)}
    assert set(found) == {*NEEDS, "S3", "Kafka", "upstream"}
    assert not any(one.ok for one in found.values())
    assert "TRIPFOLD_S3_" in found["S3"].remedy
    assert "first repair what failed above" in found["compare-and-swap"].remedy
    assert found["revisions"].found == "not checked without Kafka and S3"


def test_a_narrow_terminal_cuts_no_remedy() -> None:
    """In 80 columns the table breaks long names into lines, so that every character is there."""
    failed = Check(
        what="Kafka",
        ok=False,
        found="Kafka at kafka-1.example.com:9092,kafka-2.example.com:9092 cannot be reached",
        remedy="check TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS, and that the brokers run",
    )
    written = io.StringIO()
    Console(file=written, width=80).print(records_of([failed]).table())
    assert "…" not in written.getvalue()


async def test_keys_that_expired_or_expire_soon_are_named() -> None:
    """The check counts the API keys, and names those that have expired or expire within two weeks."""
    expiries = {"never": "", "past": ":2024-05-01", "soon": ":2024-05-15", "later": ":2024-05-16"}
    entries = ",".join(f"{name}:read:{'0' * 64}{expires}" for name, expires in expiries.items())
    found = await check_api_keys(Settings.model_validate({"api_keys": entries}), NOON - dt.timedelta(days=1))
    assert found == "4 keys; expired: past; expire within 14 days: soon"


async def test_key_file_of_everybody_is_named(tmp_path: Path) -> None:
    """The check of API keys names a file that every user of the machine may read, and the command that ends it."""
    file = tmp_path / "keys"
    file.write_text(f"reader:read:{'0' * 64}")
    for mode, found in (
        (0o644, f"1 key; every user of this machine may read or change {file}: chmod o= {file}"),
        (0o640, "1 key"),
    ):
        file.chmod(mode)
        assert await check_api_keys(Settings.model_validate({"api_keys_file": str(file)}), NOON) == found


async def test_an_object_that_makes_dead_letters_is_named_until_it_is_mended() -> None:
    """The dead letter names the object. Other dead letters say nothing of objects."""
    bucket = FakeBucket()
    key = keys.plan(dt.date(2024, 5, 1))
    bucket.store.write(key, b"{")
    failed = bucket.log.append(Topic.CITY_STATS, b"k", b"{}")
    await bucket.publisher.send_to_dead_letters(failed, "not an event of city-stats")
    await bucket.publisher.send_to_dead_letters(failed, f"{key} is not a readable Plan: truncated")
    letters = MemoryTopicReader(lambda: bucket.log.records(Topic.DEAD_LETTERS))
    with pytest.raises(CheckFailed, match=key):
        await check_dead_letters(bucket.store, letters)
    await bucket.store.delete(key)
    assert "none of the latest" in await check_dead_letters(bucket.store, letters)
