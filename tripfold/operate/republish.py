"""Publishes a range of dates from the bucket to the compacted topics again.

Consumers keep the highest revision of a key, so publishing twice is harmless. The order of effects, date by date: each
plan and manifest is read and its events are published. Then each live summary is read, counted in the change index and
published. An object that changed meanwhile is published again, so that compaction keeps its latest record. An
interrupted run continues at its last date.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Iterable

import msgspec
import typer

from services.aggregate.bucket_reader import SOURCE_PREFIXES, Dates, events_of_whole_plan, known_dates
from services.aggregate.summary_writer import publish_as_stored, publish_summary
from shared.domain import keys, objects
from shared.domain.events import Event
from shared.domain.objects import CorruptObject, Manifest, Plan
from shared.domain.outbox import events_of_manifest
from shared.kafka.producer import KafkaPublisher, Publisher
from shared.runtime.concurrency import bounded_map
from shared.storage.change_index import ChangeCounter
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectStore
from tripfold.console import printable
from tripfold.operate.command_line import (
    TABLE_ROWS_MAX,
    AsJson,
    FirstDate,
    LastDate,
    command_settings,
    console,
    date_range,
    open_bucket,
    print_json,
    print_line,
    progress_bar,
    progress_console,
    run_command,
)

OBJECTS_AT_ONCE_MAX = 16


class RepublishedDate(msgspec.Struct, frozen=True, kw_only=True):
    """One republished date: its events, its unreadable objects by key with the reason, and the run's progress."""

    date: dt.date
    events: int
    unreadable: dict[str, str]
    dates_done: int
    dates_total: int


def republish_command(first: FirstDate = None, last: LastDate = None, *, as_json: AsJson = False) -> None:
    """Publish plans, manifests and live summaries of a range of dates to the compacted topics again.

    Publishing twice is harmless: consumers keep the highest revision. An interrupted run prints the date from which to
    continue. Exit 1 if an object cannot be read.

    Example: tripfold republish --from 2024-05-01 --to 2024-05-31
    """
    selected = Dates(*date_range(first, last))
    settings = command_settings()
    published = dates = 0
    unreadable: dict[str, str] = {}
    current: dt.date | None = None

    async def run() -> None:
        nonlocal published, dates, current
        async with open_bucket(settings) as store, KafkaPublisher(settings, source="republish") as publisher:
            await publisher.check()
            with progress_bar("republishing", "dates") as show:
                async for one in republish(store, publisher, selected):
                    published, dates, current = published + one.events, dates + 1, one.date
                    unreadable.update(one.unreadable)
                    show(one.dates_done, one.dates_total)

    try:
        run_command(run())
    except BaseException:
        if current is not None:
            progress_console.print(f"{dates:,} dates are published. Continue with '--from {current}'.")
        raise
    if as_json:
        print_json({"dates": dates, "events": published, "unreadable": unreadable})
    else:
        for reason in list(unreadable.values())[:TABLE_ROWS_MAX]:
            print_line(f"Not published: {printable(reason)}")
        console.print(f"Published {published:,} events of {dates:,} dates.")
    if unreadable:
        raise typer.Exit(1)


async def republish(store: ObjectStore, publisher: Publisher, dates: Dates) -> AsyncIterator[RepublishedDate]:
    """Publish the plans, manifests and live summaries of a range of dates, in the order of the dates."""
    live = (await read_current(store)).live
    changes = ChangeCounter(store)
    found = await known_dates(store, dates, *SOURCE_PREFIXES, keys.summaries_of_generation(live))
    for done, date in enumerate(found, 1):
        unreadable: dict[str, str] = {}

        async def publish(key: str, unreadable: dict[str, str] = unreadable) -> int:
            try:
                return await _publish_object(store, publisher, changes, live, key)
            except CorruptObject as error:
                unreadable[key] = str(error)
                return 0

        truth = [keys.plan(date), *[listed.key async for listed in store.list(keys.manifests_of(date))]]
        published = sum(await bounded_map(publish, truth, limit=OBJECTS_AT_ONCE_MAX))
        summaries = [listed.key async for listed in store.list(keys.summaries_of_date(live, date))]
        published += sum(await bounded_map(publish, summaries, limit=OBJECTS_AT_ONCE_MAX))
        yield RepublishedDate(
            date=date,
            events=published,
            unreadable=unreadable,
            dates_done=done,
            dates_total=len(found),
        )


async def _publish_object(store: ObjectStore, publisher: Publisher, changes: ChangeCounter, live: int, key: str) -> int:
    if named := keys.parse_summary(key):
        date, country = named
        return await publish_summary(store, publisher, changes, generation=live, date=date, country=country)

    def events_of(body: bytes) -> Iterable[Event]:
        if key.startswith(keys.PLANS):
            return events_of_whole_plan(objects.decode(Plan, body, key))
        return events_of_manifest(objects.decode(Manifest, body, key))

    return await publish_as_stored(store, publisher, key, events_of)
