"""Expiring raw objects: what is marked and deleted, and what stays."""

from __future__ import annotations

import contextlib
import datetime as dt

import pytest
from typer.testing import CliRunner

from services.aggregate.audit.verify import verify_dates
from services.aggregate.bucket_reader import Dates
from shared.domain import keys
from shared.domain.ids import CityId
from shared.runtime.settings import Settings
from tests.fakes.bucket import DAY, FakeBucket, trips
from tripfold import cli
from tripfold.operate import expire
from tripfold.operate.expire import ExpiredDate, expire_raw
from tripfold.operate.gc import InvalidAge, collect_garbage

DEADLINE_S = 3600.0
MONTH = dt.timedelta(days=30)
ORPHAN = keys.raw(DAY, CityId("1"), "orphan")


@pytest.fixture
async def bucket() -> FakeBucket:
    """Return a city with two old revisions and an orphan, and a city with an old and a young revision; all folded."""
    bucket = FakeBucket()
    await bucket.fold(bucket.plan(1, {"armenia": [1, 2]}))
    await bucket.fold(bucket.store_file(1, 10, trips(1)), bucket.store_file(1, 11, trips(2)))
    await bucket.fold(bucket.store_file(2, 10, trips(1)))
    bucket.store.write(ORPHAN, b"[]")
    bucket.clock.advance(MONTH.total_seconds())
    await bucket.fold(bucket.store_file(2, int(MONTH.total_seconds()), trips(3)))
    bucket.clock.advance(3_601)
    return bucket


async def expired(
    bucket: FakeBucket, older_than: dt.timedelta = MONTH, *, dates: Dates | None = None, dry_run: bool = False
) -> list[ExpiredDate]:
    run = expire_raw(bucket.store, dates or Dates(), older_than=older_than, deadline_s=DEADLINE_S, dry_run=dry_run)
    return [one async for one in run]


def raw_keys(bucket: FakeBucket) -> set[str]:
    return set(bucket.store.bodies(keys.RAW))


async def no_wait(_: int) -> None:
    return


async def test_old_files_are_marked_and_deleted(bucket: FakeBucket) -> None:
    """Old files go, also of the history; young ones and those that no manifest names stay. A rerun does nothing."""
    young = bucket.manifest(2)
    assert young is not None
    [one] = await expired(bucket)
    assert (one.city_days, one.objects, one.unreadable) == (2, 3, [])
    assert raw_keys(bucket) == {young.raw_key, ORPHAN}
    [verified] = [one async for one in verify_dates(bucket.store, Dates(), deep=True, wait=no_wait)]
    assert (verified.differences, verified.raw_expired) == ([], 1)
    after = dict(bucket.store.objects)
    [again] = await expired(bucket)
    assert (again.city_days, again.objects, bucket.store.objects) == (0, 0, after)


async def test_a_dry_run_says_the_same_and_changes_nothing(bucket: FakeBucket) -> None:
    """A dry run counts what a run deletes, and writes no mark."""
    before = dict(bucket.store.objects)
    told = await expired(bucket, dry_run=True)
    assert bucket.store.objects == before
    assert told == await expired(bucket)


async def test_a_range_of_dates_limits_it(bucket: FakeBucket) -> None:
    """Files of other dates stay."""
    before = dict(bucket.store.objects)
    other = DAY + dt.timedelta(days=1)
    assert [one.objects for one in await expired(bucket, dates=Dates(other, other))] == [0]
    assert bucket.store.objects == before


async def test_gc_deletes_what_a_crash_left_after_the_mark(bucket: FakeBucket) -> None:
    """A file that was marked and not deleted is garbage."""
    stored = {key: bucket.store.objects[key] for key in raw_keys(bucket)}
    await expired(bucket)
    left = raw_keys(bucket)
    bucket.store.objects |= stored
    async for _ in collect_garbage(bucket.store, older_than=MONTH, deadline_s=DEADLINE_S, dry_run=False):
        pass
    assert raw_keys(bucket) == left - {ORPHAN}


async def test_a_file_without_a_readable_manifest_stays(bucket: FakeBucket) -> None:
    """It may be the only copy; the reason is reported."""
    manifest = keys.manifest(DAY, CityId("1"))
    of_city = {key for key in raw_keys(bucket) if "city=1/" in key}
    bucket.store.write(manifest, b"{")
    [one] = await expired(bucket)
    assert [manifest in reason for reason in one.unreadable] == [True]
    del bucket.store.objects[manifest]
    await expired(bucket)
    assert of_city <= raw_keys(bucket)


async def test_an_age_below_the_deadline_of_a_task_is_refused(bucket: FakeBucket) -> None:
    """A worker may still be at work on a file of that age."""
    with pytest.raises(InvalidAge, match="TRIPFOLD_INGEST_DEADLINE_S"):
        await expired(bucket, dt.timedelta(seconds=DEADLINE_S))


def test_the_command_fails_if_a_manifest_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script must notice that files stay; the readable rest expires."""
    bucket = FakeBucket()
    for city in (1, 2):
        bucket.store_file(city, 10, trips(1))
    bucket.store.write(keys.manifest(DAY, CityId("1")), b"{")
    bucket.clock.advance(MONTH.total_seconds() + 3_601)
    monkeypatch.setattr(expire, "open_bucket", lambda _: contextlib.nullcontext(bucket.store))
    monkeypatch.setattr(expire, "command_settings", Settings)
    ended = CliRunner().invoke(cli.app, ["expire", "raw", "--older-than", "30d"])
    assert "Kept the files of a manifest that cannot be read: manifests/" in ended.output
    assert "Deleted 1 raw files of 1 city-days" in ended.output
    assert ended.exit_code == 1
