"""Garbage collection: the objects that it deletes and the ones that it keeps."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from services.api.requests.idempotency import COLLECTED_AFTER
from shared.domain import keys, objects
from shared.domain.ids import CityId
from shared.domain.objects import ChangeCounters
from shared.storage.change_index import COUNTERS_AGE_MIN
from shared.storage.object_store import StoredObject, UnfinishedUpload
from tests.fakes.bucket import DAY, FakeBucket, trips
from tests.fakes.store import MemoryStore
from tripfold.operate.gc import GcCandidate, InvalidAge, Verdict, collect_garbage, parse_age

WEEK = dt.timedelta(days=7)
DEADLINE_S = 3600.0
ORPHAN = keys.raw(DAY, CityId("1"), "orphan")


async def cleaned(
    bucket: FakeBucket,
    *,
    dry_run: bool = False,
    older_than: dt.timedelta = WEEK,
    quarantine_older_than: dt.timedelta | None = None,
) -> list[GcCandidate]:
    sweep = collect_garbage(
        bucket.store,
        older_than=older_than,
        deadline_s=DEADLINE_S,
        dry_run=dry_run,
        quarantine_older_than=quarantine_older_than,
    )
    return [swept async for swept in sweep]


def raw_keys(bucket: FakeBucket) -> list[str]:
    return list(bucket.store.bodies("raw/"))


@pytest.fixture
def bucket() -> FakeBucket:
    """Give a city-day of two revisions and an orphan, and a second city, all eight days old."""
    bucket = FakeBucket()
    bucket.store_file(1, 10, trips(1))
    bucket.store_file(1, 11, trips(2))
    bucket.store_file(2, 10, trips(1))
    bucket.store.write(ORPHAN, b"[]")
    bucket.clock.advance(8 * 86_400)
    return bucket


async def test_only_objects_that_no_manifest_names_are_deleted(bucket: FakeBucket) -> None:
    """An old attempt that is neither current nor in the history goes; all others stay."""
    before = raw_keys(bucket)
    assert [(one.key, one.verdict) for one in await cleaned(bucket)] == [(ORPHAN, Verdict.UNNAMED_RAW)]
    assert raw_keys(bucket) == [key for key in before if key != ORPHAN]


async def test_a_moved_city_keeps_the_file_it_names(bucket: FakeBucket) -> None:
    """A revision that names an earlier attempt's raw object keeps it, whatever its own attempt is called."""
    manifest = bucket.manifest(2)
    assert manifest is not None
    moved = msgspec.structs.replace(manifest, attempt="another", revision=11)
    bucket.store.write(keys.manifest(DAY, CityId("2")), objects.encode(moved))
    await cleaned(bucket)
    assert manifest.raw_key in raw_keys(bucket)


async def test_change_counters_that_grow_no_more_are_deleted(bucket: FakeBucket) -> None:
    """Old counters go, of any generation; those of the last day stay, whatever the age is."""
    old = [keys.changes(generation, "ended") for generation in (1, 7)]
    for key in old:
        bucket.store.write(key, objects.encode(ChangeCounters()))
    bucket.clock.advance(WEEK.total_seconds() + 1)
    bucket.store.write(keys.changes(1, "running"), objects.encode(ChangeCounters()))
    deleted = [one.key for one in await cleaned(bucket) if one.verdict is Verdict.OLD_COUNTERS]
    assert deleted == old
    bucket.clock.advance(COUNTERS_AGE_MIN.total_seconds() - 1)
    await cleaned(bucket, older_than=dt.timedelta(seconds=DEADLINE_S + 1))
    assert list(bucket.store.bodies(keys.CHANGES)) == [keys.changes(1, "running")]


async def test_a_dry_run_deletes_nothing(bucket: FakeBucket) -> None:
    """A dry run reports the same and deletes nothing."""
    bucket.store.unfinished.append(unfinished(bucket, days=8))
    before = raw_keys(bucket)
    told = await cleaned(bucket, dry_run=True)
    assert (raw_keys(bucket), len(bucket.store.unfinished)) == (before, 1)
    assert told == await cleaned(bucket)


async def test_recent_objects_are_kept(bucket: FakeBucket) -> None:
    """An orphan younger than the age may belong to a worker that has not written its manifest yet."""
    young = keys.raw(DAY, CityId("1"), "young")
    bucket.store.write(young, b"[]")
    bucket.clock.advance(6 * 86_400)
    await cleaned(bucket)
    assert young in raw_keys(bucket)
    assert ORPHAN not in raw_keys(bucket)


async def test_without_a_readable_manifest_nothing_is_deleted(bucket: FakeBucket) -> None:
    """Raw objects whose manifest is lost or damaged are reported and kept: they may be the only copy."""
    del bucket.store.objects[keys.manifest(DAY, CityId("1"))]
    bucket.store.write(keys.manifest(DAY, CityId("2")), b"{")
    before = raw_keys(bucket)
    told = await cleaned(bucket)
    assert raw_keys(bucket) == before
    assert {one.verdict for one in told} == {Verdict.NO_MANIFEST, Verdict.UNREADABLE_MANIFEST}


async def test_unfinished_uploads_are_aborted_by_their_age(bucket: FakeBucket) -> None:
    """An upload begun before the age is aborted, a younger one is left to its worker."""
    bucket.store.unfinished += [unfinished(bucket, days=8), unfinished(bucket, days=1)]
    await cleaned(bucket)
    assert [upload.upload_id for upload in bucket.store.unfinished] == ["upload-1"]


@pytest.mark.parametrize("seconds", [60, 3600])
async def test_an_age_within_the_deadline_is_refused(bucket: FakeBucket, seconds: int) -> None:
    """An age that is not longer than a task's deadline is refused before anything is looked at."""
    with pytest.raises(InvalidAge, match="must exceed the deadline"):
        await cleaned(bucket, older_than=dt.timedelta(seconds=seconds))
    assert ORPHAN in raw_keys(bucket)


def quarantine(bucket: FakeBucket, attempt: str, city: str = "1") -> tuple[str, str]:
    """Put a file of a city into quarantine; return its raw key and its report's."""
    key, report = keys.raw(DAY, CityId(city), attempt), keys.quarantine_report(DAY, CityId(city), attempt)
    bucket.store.write(key, b"[7]")
    bucket.store.write(report, b"{}")
    return key, report


async def test_only_old_quarantined_files_are_deleted(bucket: FakeBucket) -> None:
    """A report goes with its raw object, the report first, by the quarantine's own age; until then both stay."""
    old = quarantine(bucket, "old")
    bucket.clock.advance(10 * 86_400)
    young = quarantine(bucket, "young")
    assert not {*old, *young} & {one.key for one in await cleaned(bucket)}
    told = await cleaned(bucket, quarantine_older_than=dt.timedelta(days=9), dry_run=True)
    assert told == await cleaned(bucket, quarantine_older_than=dt.timedelta(days=9))
    assert [one.key for one in told if one.key in old] == [old[1], old[0]]
    assert {*old, *young} & set(bucket.store.objects) == set(young)


async def test_a_file_that_was_refused_again_stays(bucket: FakeBucket) -> None:
    """A report that was written lately keeps its raw object, however old the bytes are."""
    key, report = quarantine(bucket, "again")
    bucket.clock.advance(10 * 86_400)
    bucket.store.write(report, b"{}")
    await cleaned(bucket, quarantine_older_than=dt.timedelta(days=9))
    assert {key, report} <= set(bucket.store.objects)


async def test_a_raw_object_without_manifest_or_report_stays(bucket: FakeBucket) -> None:
    """A city-day without a manifest: an unknown file is reported as kept in doubt, a refused file is not."""
    refused, _ = quarantine(bucket, "refused", city="9")
    unknown = keys.raw(DAY, CityId("9"), "unknown")
    bucket.store.write(unknown, b"[7]")
    bucket.clock.advance(8 * 86_400)
    told = {one.key: one.verdict for one in await cleaned(bucket)}
    assert (told.get(refused), told[unknown]) == (None, Verdict.NO_MANIFEST)
    assert {refused, unknown} <= set(raw_keys(bucket))


async def test_old_notes_of_attempts_are_deleted(bucket: FakeBucket) -> None:
    """The old note of a crashed worker is deleted, and with it the count of its crashes."""
    bucket.store.write(keys.attempt(DAY, CityId("1")), b"{}")
    bucket.clock.advance(8 * 86_400)
    bucket.store.write(keys.attempt(DAY, CityId("2")), b"{}")
    await cleaned(bucket)
    assert list(bucket.store.bodies("attempts/")) == [keys.attempt(DAY, CityId("2"))]


async def test_claims_of_idempotency_keys_are_deleted_after_two_days(bucket: FakeBucket) -> None:
    """A claim holds for a day, so no client relies on one of two days; a younger one stays, whatever the age is."""
    old, young = map(keys.idempotency, ("a", "b"))
    bucket.store.write(old, b"{}")
    bucket.clock.advance(COLLECTED_AFTER.total_seconds() - 60)
    bucket.store.write(young, b"{}")
    bucket.clock.advance(120)
    deleted = [one.key for one in await cleaned(bucket, older_than=dt.timedelta(seconds=DEADLINE_S + 1))]
    assert (old in deleted, young in deleted) == (True, False)


async def test_an_age_of_quarantine_within_the_deadline_is_refused(bucket: FakeBucket) -> None:
    """A file that may just be coming into quarantine is not looked at."""
    with pytest.raises(InvalidAge, match="must exceed the deadline"):
        await cleaned(bucket, quarantine_older_than=dt.timedelta(minutes=5))


class RacingStore(MemoryStore):
    """Before call number ``at``, a worker that began an hour ago swaps its manifest in."""

    def __init__(self, bucket: FakeBucket, at: int) -> None:
        super().__init__(bucket.clock)
        self.objects = bucket.store.objects
        self._bucket = bucket
        self._left = at
        self.calls = 0

    def _race(self) -> None:
        self.calls += 1
        if self.calls == self._left:
            manifest = self._bucket.manifest(1)
            assert manifest is not None
            past = msgspec.structs.replace(manifest.history[0], raw_key=manifest.raw_key, attempt=manifest.attempt)
            later = msgspec.structs.replace(manifest, revision=12, raw_key=YOUNG, attempt="young")
            later = msgspec.structs.replace(later, history=(past, *manifest.history))
            self.write(keys.manifest(DAY, CityId("1")), objects.encode(later))

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        self._race()
        return await super().get(key, first_bytes=first_bytes)

    async def delete(self, key: str) -> None:
        self._race()
        await super().delete(key)

    async def now(self) -> dt.datetime:
        self._race()
        return await super().now()


YOUNG = keys.raw(DAY, CityId("1"), "young")


@pytest.mark.parametrize("at", range(1, 5))
async def test_a_manifest_written_during_gc_keeps_its_objects(bucket: FakeBucket, at: int) -> None:
    """Whenever a worker writes its manifest during gc, every object that it names still exists."""
    bucket.store.write(YOUNG, b"[]")
    bucket.clock.advance(DEADLINE_S - 1)
    bucket.store = racing = RacingStore(bucket, at)
    await cleaned(bucket, older_than=dt.timedelta(seconds=DEADLINE_S + 1))
    manifest = bucket.manifest(1)
    assert manifest is not None
    named = {manifest.raw_key, *(past.raw_key for past in manifest.history)}
    assert (racing.calls, manifest.revision) == (4, 12)
    assert named <= set(raw_keys(bucket))
    assert ORPHAN not in raw_keys(bucket)


@pytest.mark.parametrize(("text", "seconds"), [("7d", 604_800), ("36h", 129_600), ("90m", 5_400), ("7200s", 7_200)])
def test_an_age_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    """An age is a number and its unit."""
    assert parse_age(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["7", "d", "-7d", "7 d", "1w", ""])
def test_an_invalid_age_is_refused(text: str) -> None:
    """The error names a text that is no age."""
    with pytest.raises(InvalidAge, match="must be a number and s, m, h or d"):
        parse_age(text)


def unfinished(bucket: FakeBucket, *, days: int) -> UnfinishedUpload:
    return UnfinishedUpload(key=ORPHAN, upload_id=f"upload-{days}", begun_at=bucket.clock() - dt.timedelta(days=days))
