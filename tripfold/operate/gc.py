"""Cleaning up: raw attempts that lost their race, uploads that were never ended, what has been in quarantine for long.

Why nothing is robbed of its raw object: only objects older than an age are looked at, by the store's clock alone, and
that age is longer than the deadline of any task. So the worker that wrote one has long swapped its manifest in, or
never will. The manifest is read after the object was listed, and what it names, now or in its history, is kept; a
later revision can only name what the one before it named, or what is young. A raw object that a report in quarantine
names is kept too. Without a manifest nothing is deleted.

A file in quarantine goes once its report has been left alone for an age of its own: a file that is refused again makes
its report young. The report goes first, so that no report is ever about bytes that are gone; then the raw object. If
the clean-up dies between the two, and the city-day has no manifest, the raw object stays.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
from collections.abc import AsyncIterator

import msgspec

from shared.domain import keys
from shared.domain.errors import OperatorError
from shared.domain.ids import CityId
from shared.domain.objects import CorruptObject, Manifest
from shared.storage.object_store import AdminObjectStore, ObjectInfo, ObjectStore
from shared.storage.repository import Repository

_AGE = re.compile(r"(\d{1,6})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_RAW = re.compile(r"raw/date=(\d{4}-\d{2}-\d{2})/city=([^/]+)/[^/]+\.json")
_REPORT = re.compile(r"quarantine/date=(\d{4}-\d{2}-\d{2})/city=([^/]+)/([^/]+)\.error\.json")


class InvalidAge(OperatorError):
    """The age cannot be read, or is so short that a task may still be at work on what is that old."""


class Verdict(enum.Enum):
    """What becomes of something that was looked at."""

    RAW_ATTEMPT = "raw attempt that no manifest names"
    EXPIRED_QUARANTINE = "raw object of a file in quarantine"
    EXPIRED_REPORT = "report on a file in quarantine"
    LEFT_ATTEMPTS = "note of attempts that died"
    UNFINISHED_UPLOAD = "unfinished upload"
    NO_MANIFEST = "kept: there is no manifest of this city-day"
    UNREADABLE_MANIFEST = "kept: the manifest of this city-day cannot be read"

    @property
    def deleted(self) -> bool:
        """Whether it is deleted."""
        return self not in {Verdict.NO_MANIFEST, Verdict.UNREADABLE_MANIFEST}


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """Something old that nobody is known to need. The size of an unfinished upload is not known, and 0."""

    key: str
    verdict: Verdict
    size_bytes: int
    written_at: dt.datetime


def parse_age(text: str) -> dt.timedelta:
    """Read an age such as ``7d``, ``36h``, ``90m`` or ``7200s``. Raises InvalidAge."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise InvalidAge(f"{text!r} is not an age: expected a number and s, m, h or d, such as 7d or 36h")
    return dt.timedelta(seconds=int(match[1]) * _UNIT_S[match[2]])


async def clean(
    store: AdminObjectStore,
    *,
    older_than: dt.timedelta,
    deadline_s: float,
    dry_run: bool,
    quarantine_older_than: dt.timedelta | None = None,
) -> AsyncIterator[Swept]:
    """Delete what is older than an age and named by no manifest; give each as it goes, and what is kept in doubt.

    Files in quarantine go if they are older than ``quarantine_older_than``; without it they stay. Raises InvalidAge
    unless both ages are longer than ``deadline_s``, the longest that a task may take.
    """
    _require_longer(older_than, deadline_s)
    _require_longer(quarantine_older_than, deadline_s)
    now = await store.now()
    before = now - older_than
    sweeps = [
        _sweep_raw(store, before),
        _sweep_left(store, keys.ATTEMPTS, Verdict.LEFT_ATTEMPTS, before),
    ]
    if quarantine_older_than is not None:
        sweeps.append(_sweep_quarantine(store, now - quarantine_older_than))
    for sweep in sweeps:
        async for swept in sweep:
            if swept.verdict.deleted and not dry_run:
                await store.delete(swept.key)
            yield swept
    async for unfinished in store.unfinished_uploads(keys.RAW):
        if unfinished.begun_at < before:
            if not dry_run:
                await store.abort_upload(unfinished)
            yield Swept(
                key=unfinished.key, verdict=Verdict.UNFINISHED_UPLOAD, size_bytes=0, written_at=unfinished.begun_at
            )


def _require_longer(age: dt.timedelta | None, deadline_s: float) -> None:
    if age is not None and age.total_seconds() <= deadline_s:
        raise InvalidAge(
            f"an age of {age.total_seconds():.0f} s is not longer than the deadline of a task, "
            f"{deadline_s:.0f} s (TRIPFOLD_INGEST_DEADLINE_S): a worker could still name what is that old"
        )


async def _sweep_raw(store: ObjectStore, before: dt.datetime) -> AsyncIterator[Swept]:
    async for folder in _folders(store, keys.RAW):
        old = [one for one in folder if one.last_modified < before and _RAW.fullmatch(one.key) is not None]
        if old:
            for swept in await _judge(store, old):
                yield swept


async def _sweep_left(store: ObjectStore, prefix: str, verdict: Verdict, before: dt.datetime) -> AsyncIterator[Swept]:
    """Give what lies under a prefix and is written over and over while anybody needs it."""
    async for listed in store.list(prefix):
        if listed.last_modified < before:
            yield _swept(listed, verdict)


async def _sweep_quarantine(store: ObjectStore, before: dt.datetime) -> AsyncIterator[Swept]:
    async for report in store.list(keys.QUARANTINE):
        match = _REPORT.fullmatch(report.key)
        if match is None or report.last_modified >= before:
            continue
        yield _swept(report, Verdict.EXPIRED_REPORT)
        raw_key = keys.raw(dt.date.fromisoformat(match[1]), CityId(match[2]), match[3])
        async for listed in store.list(raw_key):
            yield _swept(listed, Verdict.EXPIRED_QUARANTINE)


async def _folders(store: ObjectStore, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
    """Give the objects under a prefix, those of one city-day after the other."""
    group: list[ObjectInfo] = []
    async for listed in store.list(prefix):
        if group and listed.key.rpartition("/")[0] != group[0].key.rpartition("/")[0]:
            yield group
            group = []
        group.append(listed)
    if group:
        yield group


async def _judge(store: ObjectStore, group: list[ObjectInfo]) -> list[Swept]:
    match = _RAW.fullmatch(group[0].key)
    assert match is not None
    date, city_id = dt.date.fromisoformat(match[1]), CityId(match[2])
    try:
        manifest = await Repository(store).get(Manifest, keys.manifest(date, city_id))
    except CorruptObject:
        return [_swept(listed, Verdict.UNREADABLE_MANIFEST) for listed in group]
    if manifest is None:
        named: set[str] = set()
        verdict = Verdict.NO_MANIFEST
    else:
        named = {manifest.raw_key, *(past.raw_key for past in manifest.history)}
        verdict = Verdict.RAW_ATTEMPT
    unnamed = [listed for listed in group if listed.key not in named]
    if unnamed:
        reports = {listed.key async for listed in store.list(keys.quarantine_of(date, city_id))}
        unnamed = [listed for listed in unnamed if _report_of_raw(listed.key) not in reports]
    return [_swept(listed, verdict) for listed in unnamed]


def _report_of_raw(raw_key: str) -> str:
    """Return the key of the report on the file that a raw attempt brought, if it was refused."""
    return f"{keys.QUARANTINE}{raw_key.removeprefix(keys.RAW).removesuffix('.json')}{keys.REPORT_SUFFIX}"


def _swept(listed: ObjectInfo, verdict: Verdict) -> Swept:
    return Swept(key=listed.key, verdict=verdict, size_bytes=listed.size_bytes, written_at=listed.last_modified)
