"""Cleaning up what nobody will ever name: raw attempts that lost their race, uploads that were never ended.

Why nothing is robbed of its raw object: only objects older than an age are looked at, by the store's clock alone, and
that age is longer than the deadline of any task. So the worker that wrote one has long swapped its manifest in, or
never will. The manifest is read after the object was listed, and what it names, now or in its history, is kept; a
later revision can only name what the one before it named, or what is young. Without a manifest nothing is deleted.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
from collections.abc import AsyncIterator

import msgspec

from shared import keys, objects
from shared.errors import OperatorError
from shared.identity import CityId
from shared.objects import CorruptObject, Manifest
from shared.store import Listed, ObjectStore, OperatedStore

_AGE = re.compile(r"(\d{1,6})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_RAW = re.compile(r"raw/date=(\d{4}-\d{2}-\d{2})/city=([^/]+)/[^/]+\.json")


class InvalidAge(OperatorError):
    """The age cannot be read, or is so short that a task may still be at work on what is that old."""


class Verdict(enum.Enum):
    """What becomes of something that was looked at."""

    RAW_ATTEMPT = "raw attempt that no manifest names"
    UNFINISHED_UPLOAD = "unfinished upload"
    NO_MANIFEST = "kept: there is no manifest of this city-day"
    UNREADABLE_MANIFEST = "kept: the manifest of this city-day cannot be read"

    @property
    def deleted(self) -> bool:
        """Whether it is deleted."""
        return self in {Verdict.RAW_ATTEMPT, Verdict.UNFINISHED_UPLOAD}


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """Something old that no manifest is known to name. The size of an unfinished upload is not known, and 0."""

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
    store: OperatedStore, *, older_than: dt.timedelta, deadline_s: float, dry_run: bool
) -> AsyncIterator[Swept]:
    """Delete what is older than an age and named by no manifest; give each as it goes, and what is kept in doubt.

    Raises InvalidAge unless the age is longer than ``deadline_s``, the longest that a task may take.
    """
    if older_than.total_seconds() <= deadline_s:
        raise InvalidAge(
            f"an age of {older_than.total_seconds():.0f} s is not longer than the deadline of a task, "
            f"{deadline_s:.0f} s (TRIPFOLD_INGEST_DEADLINE_S): a worker could still name what is that old"
        )
    before = await store.now() - older_than
    async for group in _city_days(store, before):
        for swept in await _judge(store, group):
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


async def _city_days(store: ObjectStore, before: dt.datetime) -> AsyncIterator[list[Listed]]:
    """Give the raw objects that were written before a time, one city-day after the other."""
    group: list[Listed] = []
    folder = ""
    async for listed in store.list(keys.RAW):
        if listed.last_modified >= before or _RAW.fullmatch(listed.key) is None:
            continue
        if listed.key.rpartition("/")[0] != folder and group:
            yield group
            group = []
        folder = listed.key.rpartition("/")[0]
        group.append(listed)
    if group:
        yield group


async def _judge(store: ObjectStore, group: list[Listed]) -> list[Swept]:
    match = _RAW.fullmatch(group[0].key)
    assert match is not None
    key = keys.manifest(dt.date.fromisoformat(match[1]), CityId(match[2]))
    found = await store.get(key)
    try:
        manifest = objects.decode(Manifest, found.body, key) if found else None
    except CorruptObject:
        return [_swept(listed, Verdict.UNREADABLE_MANIFEST) for listed in group]
    if manifest is None:
        return [_swept(listed, Verdict.NO_MANIFEST) for listed in group]
    named = {manifest.raw_key, *(past.raw_key for past in manifest.history)}
    return [_swept(listed, Verdict.RAW_ATTEMPT) for listed in group if listed.key not in named]


def _swept(listed: Listed, verdict: Verdict) -> Swept:
    return Swept(key=listed.key, verdict=verdict, size_bytes=listed.size_bytes, written_at=listed.last_modified)
