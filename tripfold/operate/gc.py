"""Deletes objects that nothing needs: orphaned raw objects, unfinished uploads, old quarantine, counters and claims.

A raw object that a manifest may still name is never deleted:

- Only objects older than an age are candidates, by the store's clock, and the age exceeds the deadline of a task. So
  the worker that wrote one has written its manifest long ago, or never will.
- The manifest is read after the raw objects are listed. Every raw object that it names, now or in its history, is kept,
  unless it has expired (``expire.py``). A later revision can only name those, or a young one.
- A raw object that a quarantine report names is kept.
- Without a manifest nothing of a city-day is deleted.

A quarantined file has an age of its own, which begins again when the file is refused again. The order of effects:

1. A compare-and-swap marks the report as expired, if the report is still as listed. A worker that renews the report
   meanwhile wins, or conflicts and then stores a report of its own: it renews no report with the mark.
2. The report is deleted, so no report is about a missing file; then the raw object.

If gc crashes between the two, the report stays for as long as a new one. If it crashes within the second step, and the
city-day has no manifest, the raw object stays.

Every process that writes summaries leaves its change counters. Those that have not grown for that age, and for a day,
are deleted. A process that still runs creates its counters again, and a reader that misses counters lists every month.

The claims of idempotency keys are deleted when no client can rely on them any more.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
import typer

from services.api.requests.idempotency import COLLECTED_AFTER
from shared.domain import keys
from shared.domain.errors import OperatorError
from shared.domain.ids import CityId
from shared.domain.objects import CorruptObject, Manifest, NewerObject, QuarantineReport
from shared.storage.change_index import COUNTERS_AGE_MIN
from shared.storage.object_store import AdminObjectStore, CasConflict, ObjectInfo, ObjectStore
from shared.storage.repository import Repository, Versioned
from tripfold.console import Records, print_remark
from tripfold.operate.command_line import (
    JSON_ITEMS_MAX,
    AsJson,
    command_settings,
    console,
    open_bucket,
    print_json,
    run_command,
)

_AGE = re.compile(r"(\d{1,6})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_RAW = re.compile(r"raw/date=(\d{4}-\d{2}-\d{2})/city=([^/]+)/[^/]+\.json")
_REPORT = re.compile(r"quarantine/date=(\d{4}-\d{2}-\d{2})/city=([^/]+)/([^/]+)\.error\.json")


class InvalidAge(OperatorError):
    """The age cannot be parsed, or a task may run longer than it."""


class Verdict(enum.Enum):
    """Why an old object is deleted or kept."""

    UNNAMED_RAW = "raw object that no manifest names"
    EXPIRED_QUARANTINE = "raw object of an old quarantined file"
    EXPIRED_REPORT = "report on an old quarantined file"
    STALE_ATTEMPTS = "notes on attempts whose process crashed"
    OLD_COUNTERS = "change counters that grow no more"
    OLD_CLAIM = "claim of an idempotency key that is free again"
    UNFINISHED_UPLOAD = "unfinished upload"
    NO_MANIFEST = "kept: this city-day has no manifest"
    UNREADABLE_MANIFEST = "kept: the manifest of this city-day cannot be read"

    @property
    def deleted(self) -> bool:
        """Whether it is deleted."""
        return self not in {Verdict.NO_MANIFEST, Verdict.UNREADABLE_MANIFEST}


class GcCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """An old object that nothing is known to need. The size of an unfinished upload is unknown, and 0."""

    key: str
    verdict: Verdict
    size_bytes: int
    written_at: dt.datetime


def gc_command(
    *,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="The least age, by the store's clock: a number and s, m, h or d.")
    ] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the objects, and delete none.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete raw objects that no manifest or report names, unfinished uploads, old quarantine and change counters.

    A manifest names its raw object and those of its history. Files in quarantine have an age of their own,
    TRIPFOLD_QUARANTINE_DAYS.

    Example: tripfold gc --older-than 14d --dry-run
    """
    settings = command_settings()

    async def run() -> tuple[int, int, list[GcCandidate]]:
        deleted = size_bytes = 0
        kept: list[GcCandidate] = []
        async with open_bucket(settings) as store:
            async for one in collect_garbage(
                store,
                older_than=parse_age(older_than),
                quarantine_older_than=dt.timedelta(days=settings.quarantine_days),
                deadline_s=settings.attempt_limit_s,
                dry_run=dry_run,
            ):
                deleted += one.verdict.deleted
                size_bytes += one.size_bytes if one.verdict.deleted else 0
                kept += [one][: JSON_ITEMS_MAX - len(kept)]
        return deleted, size_bytes, kept

    deleted, size_bytes, kept = run_command(run())
    if as_json:
        print_json({"dry_run": dry_run, "deleted": deleted, "size_bytes": size_bytes, "found": kept})
        return
    if kept:
        records = Records("key", "what", "bytes", "written")
        for one in kept:
            records.add(one.key, one.verdict.value, one.size_bytes, f"{one.written_at:%Y-%m-%d %H:%M}")
        records.print(console)
    print_remark(f"{'Would delete' if dry_run else 'Deleted'} {deleted:,} objects, {size_bytes:,} bytes.")


def parse_age(text: str) -> dt.timedelta:
    """Parse an age such as ``7d``, ``36h``, ``90m`` or ``7200s``. Raises InvalidAge."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise InvalidAge(f"the age is {text!r}; it must be a number and s, m, h or d, such as 7d or 36h")
    return dt.timedelta(seconds=int(match[1]) * _UNIT_S[match[2]])


async def collect_garbage(
    store: AdminObjectStore,
    *,
    older_than: dt.timedelta,
    deadline_s: float,
    dry_run: bool,
    quarantine_older_than: dt.timedelta | None = None,
) -> AsyncIterator[GcCandidate]:
    """Delete objects older than ``older_than`` that nothing needs; yield each, and each that is kept in doubt.

    Quarantined files are deleted if they are older than ``quarantine_older_than``; without it they are kept. Raises
    InvalidAge unless both ages exceed ``deadline_s``, the longest time that a task may take.
    """
    require_longer(older_than, deadline_s)
    require_longer(quarantine_older_than, deadline_s)
    now = await store.now()
    before = now - older_than
    scans = [
        _old_raw_objects(store, before),
        _old(store, keys.ATTEMPTS, before, Verdict.STALE_ATTEMPTS),  # a worker that needs its note keeps it young
        _old(store, keys.CHANGES, min(before, now - COUNTERS_AGE_MIN), Verdict.OLD_COUNTERS),
        _old(store, keys.IDEMPOTENCY, min(before, now - COLLECTED_AFTER), Verdict.OLD_CLAIM),
    ]
    if quarantine_older_than is not None:
        scans.insert(0, _old_quarantine(store, now - quarantine_older_than, dry_run=dry_run))
    for scan in scans:
        async for candidate in scan:
            if candidate.verdict.deleted and not dry_run:
                await store.delete(candidate.key)
            yield candidate
    async for unfinished in store.unfinished_uploads(keys.RAW):
        if unfinished.begun_at < before:
            if not dry_run:
                await store.abort_upload(unfinished)
            yield GcCandidate(
                key=unfinished.key, verdict=Verdict.UNFINISHED_UPLOAD, size_bytes=0, written_at=unfinished.begun_at
            )


def require_longer(age: dt.timedelta | None, deadline_s: float) -> None:
    """Raise InvalidAge if a worker may still write a manifest that names an object of this age."""
    if age is not None and age.total_seconds() <= deadline_s:
        raise InvalidAge(
            f"the age is {age.total_seconds():.0f} s; it must exceed the deadline of a task, {deadline_s:.0f} s (24 "
            f"times TRIPFOLD_INGEST_DEADLINE_S), as a worker may still write a manifest that names an object of that "
            f"age"
        )


async def _old_raw_objects(store: ObjectStore, before: dt.datetime) -> AsyncIterator[GcCandidate]:
    async for folder in raw_folders(store, keys.RAW):
        old = [one for one in folder if one.last_modified < before]
        if old:
            for candidate in await _judge(store, old):
                yield candidate


async def _old(store: ObjectStore, prefix: str, before: dt.datetime, verdict: Verdict) -> AsyncIterator[GcCandidate]:
    async for listed in store.list(prefix):
        if listed.last_modified < before:
            yield _candidate(listed, verdict)


async def _old_quarantine(store: ObjectStore, before: dt.datetime, *, dry_run: bool) -> AsyncIterator[GcCandidate]:
    async for report in store.list(keys.QUARANTINE):
        match = _REPORT.fullmatch(report.key)
        if match is None or report.last_modified >= before:
            continue
        if not dry_run and not await _mark_expired(store, report):
            continue
        yield _candidate(report, Verdict.EXPIRED_REPORT)
        raw_key = keys.raw(dt.date.fromisoformat(match[1]), CityId(match[2]), match[3])
        async for listed in store.list(raw_key):
            yield _candidate(listed, Verdict.EXPIRED_QUARANTINE)


async def _mark_expired(store: ObjectStore, listed: ObjectInfo) -> bool:
    """Mark a report, so that no worker renews it any more; return False if it is not as it was listed."""
    reports = Repository(store)
    try:
        found = await reports.get(QuarantineReport, listed.key)
        if found is not None and not found.expired:
            expired = msgspec.structs.replace(found, expired=True)
            await reports.compare_and_swap(listed.key, expired, over=Versioned(found, listed.etag))
    except (NewerObject, CasConflict):
        return False
    except CorruptObject:
        return True  # no worker renews a report that it cannot read
    return True


async def raw_folders(store: ObjectStore, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
    """Yield the raw objects under a prefix, grouped by city-day."""
    group: list[ObjectInfo] = []
    async for listed in store.list(prefix):
        if _RAW.fullmatch(listed.key) is None:
            continue
        if group and listed.key.rpartition("/")[0] != group[0].key.rpartition("/")[0]:
            yield group
            group = []
        group.append(listed)
    if group:
        yield group


def city_day_of(group: list[ObjectInfo]) -> tuple[dt.date, CityId]:
    """Return the date and the city of raw objects of one city-day."""
    match = _RAW.fullmatch(group[0].key)
    assert match is not None
    return dt.date.fromisoformat(match[1]), CityId(match[2])


async def _judge(store: ObjectStore, group: list[ObjectInfo]) -> list[GcCandidate]:
    date, city_id = city_day_of(group)
    try:
        manifest = await Repository(store).get(Manifest, keys.manifest(date, city_id))
    except CorruptObject:
        return [_candidate(listed, Verdict.UNREADABLE_MANIFEST) for listed in group]
    if manifest is None:
        named: frozenset[str] = frozenset()
        verdict = Verdict.NO_MANIFEST
    else:
        named = manifest.raw_keys - manifest.expired_raw_keys()
        verdict = Verdict.UNNAMED_RAW
    unnamed = [listed for listed in group if listed.key not in named]
    if unnamed:
        reports = {listed.key async for listed in store.list(keys.quarantine_of(date, city_id))}
        unnamed = [listed for listed in unnamed if _report_of_raw(listed.key) not in reports]
    return [_candidate(listed, verdict) for listed in unnamed]


def _report_of_raw(raw_key: str) -> str:
    """Return the key of the quarantine report on a raw object, whether it exists or not."""
    return f"{keys.QUARANTINE}{raw_key.removeprefix(keys.RAW).removesuffix('.json')}{keys.REPORT_SUFFIX}"


def _candidate(listed: ObjectInfo, verdict: Verdict) -> GcCandidate:
    return GcCandidate(key=listed.key, verdict=verdict, size_bytes=listed.size_bytes, written_at=listed.last_modified)
