"""Lets raw objects expire: marks them in the manifests, then deletes them.

The order of effects, for each city-day:

1. A compare-and-swap of the manifest records the time before which its raw objects have expired. Its revision stays.
2. The raw objects that the manifest names, now or in its history, and that are older are deleted.

After the mark nothing counts them as lost. After a crash between the two, the next run or `tripfold gc` deletes them.
Objects that no manifest names are left to gc.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
import typer

from services.aggregate.bucket_reader import Dates, known_dates
from shared.domain import keys
from shared.domain.objects import CorruptObject, Manifest
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import AdminObjectStore, ObjectInfo
from shared.storage.repository import Repository
from tripfold.console import printable
from tripfold.operate.command_line import (
    JSON_ITEMS_MAX,
    TABLE_ROWS_MAX,
    AsJson,
    FirstDate,
    LastDate,
    command_settings,
    date_range,
    open_bucket,
    print_json,
    print_line,
    progress_bar,
    run_command,
)
from tripfold.operate.gc import city_day_of, parse_age, raw_folders, require_longer

CITY_DAYS_AT_ONCE_MAX = 16

expire_commands = typer.Typer(help="Delete stored files by their age.", no_args_is_help=True, add_completion=False)


class ExpiredDate(msgspec.Struct, frozen=True, kw_only=True):
    """The expired raw objects of one date, the manifests that cannot be read, and the progress over all dates."""

    date: dt.date
    city_days: int
    objects: int
    size_bytes: int
    unreadable: list[str]
    dates_done: int
    dates_total: int


@expire_commands.callback()
def expire_group() -> None:
    """Keep the name of the only command: Typer would make it the group itself."""


@expire_commands.command("raw")
def raw_command(
    first: FirstDate = None,
    last: LastDate = None,
    *,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="The least age of a file in the bucket: a number and s, m, h or d.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be deleted, and delete nothing.")] = (
        False
    ),
    as_json: AsJson = False,
) -> None:
    """Delete the raw files that are older than an age. The numbers stay, and an unchanged file is not fetched again.

    A manifest is marked before its files are deleted, so 'tripfold verify --deep' counts them as expired, not as lost.
    'tripfold backfill --source bucket' can no longer read them. Services keep running. Safe to stop and to run again.
    Exit 1 if a manifest cannot be read.

    Example: tripfold expire raw --older-than 400d --dry-run
    """
    settings = command_settings()
    age = parse_age(older_than)
    dates = Dates(*date_range(first, last))

    async def run() -> tuple[int, int, int, list[str]]:
        city_days = objects = size_bytes = 0
        unreadable: list[str] = []
        async with open_bucket(settings) as store:
            with progress_bar("expiring", "dates") as show:
                async for one in expire_raw(
                    store, dates, older_than=age, deadline_s=settings.attempt_limit_s, dry_run=dry_run
                ):
                    city_days, objects = city_days + one.city_days, objects + one.objects
                    size_bytes += one.size_bytes
                    unreadable += one.unreadable[: JSON_ITEMS_MAX - len(unreadable)]
                    show(one.dates_done, one.dates_total, f", {objects:,} files, {size_bytes:,} bytes")
        return city_days, objects, size_bytes, unreadable

    city_days, objects, size_bytes, unreadable = run_command(run())
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "city_days": city_days,
                "deleted": objects,
                "size_bytes": size_bytes,
                "unreadable": unreadable,
            }
        )
    else:
        for reason in unreadable[:TABLE_ROWS_MAX]:
            print_line(printable(f"Kept the files of a manifest that cannot be read: {reason}"))
        if len(unreadable) > TABLE_ROWS_MAX:
            print_line(f"… and more such manifests: see them with --json, at most {JSON_ITEMS_MAX:,}.")
        verb = "Would delete" if dry_run else "Deleted"
        print_line(f"{verb} {objects:,} raw files of {city_days:,} city-days, {size_bytes:,} bytes.")
    if unreadable:
        raise typer.Exit(1)


async def expire_raw(
    store: AdminObjectStore, dates: Dates, *, older_than: dt.timedelta, deadline_s: float, dry_run: bool
) -> AsyncIterator[ExpiredDate]:
    """Mark and delete the raw objects older than ``older_than``, date by date. Started again, it continues.

    Raises InvalidAge unless the age exceeds ``deadline_s``, the longest time that a task may take.
    """
    require_longer(older_than, deadline_s)
    before = await store.now() - older_than
    known = await known_dates(store, dates, keys.RAW)
    for done, date in enumerate(known, 1):
        folders = [folder async for folder in raw_folders(store, keys.raw_of(date))]
        old = [folder for folder in folders if any(one.last_modified < before for one in folder)]
        results = await bounded_map(
            lambda folder: _expire_city_day(store, folder, before, dry_run=dry_run), old, limit=CITY_DAYS_AT_ONCE_MAX
        )
        expired = [result for result in results if isinstance(result, list) and result]
        yield ExpiredDate(
            date=date,
            city_days=len(expired),
            objects=sum(len(of_city) for of_city in expired),
            size_bytes=sum(one.size_bytes for of_city in expired for one in of_city),
            unreadable=[result for result in results if isinstance(result, str)],
            dates_done=done,
            dates_total=len(known),
        )


async def _expire_city_day(
    store: AdminObjectStore, folder: list[ObjectInfo], before: dt.datetime, *, dry_run: bool
) -> list[ObjectInfo] | str:
    """Return the expired objects of a city-day, or the reason why its manifest cannot be read."""
    listed = {one.key: one for one in folder}
    key = keys.manifest(*city_day_of(folder))
    repository = Repository(store)

    async def marked(manifest: Manifest | None) -> Manifest | None:
        if manifest is None or manifest.expired_raw_keys(before).isdisjoint(listed):
            return manifest
        mark = max(before, manifest.raw_expired_before or before)
        return msgspec.structs.replace(manifest, raw_expired_before=mark)

    try:
        if dry_run:
            after = await marked(await repository.get(Manifest, key))
        else:
            after = await repository.update(Manifest, key, marked, counted_as="manifest")
    except CorruptObject as error:
        return str(error)
    expired = [listed[key] for key in sorted(after.expired_raw_keys() & listed.keys())] if after else []
    if not dry_run:
        for one in expired:
            await store.delete(one.key)
    return expired
