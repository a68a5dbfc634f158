"""Reads stored raw objects again under the present parsing rules, and writes the manifests that result.

The order of effects is that of a worker, without the upstream: read the manifest, stream its raw object, write the next
revision with a compare-and-swap, publish it. A file that is ingested meanwhile makes the compare-and-swap fail; the
command then reads the new manifest.

A manifest that already has the present rules is published if its summary does not have it yet. So a run that was
stopped between the write and the publication continues where it stopped.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from services.aggregate.audit.repair import TooManyConflicts
from services.aggregate.bucket_reader import Dates, known_dates, read_summaries
from services.aggregate.summary_writer import publish_as_stored
from services.ingest.parsing.trips import rule_version
from services.ingest.worker.manifest import gives_same_totals, reprocessed
from services.ingest.worker.streaming import FileRefused, StreamedFile, StreamProgress, stream_file
from shared.domain import keys, objects
from shared.domain.contribution import Contribution
from shared.domain.file_rules import FileRules
from shared.domain.ids import CityId, CountrySlug, utc_now
from shared.domain.objects import CorruptObject, Manifest, NewerObject, Summary
from shared.domain.outbox import events_of_manifest
from shared.kafka.producer import KafkaPublisher, Publisher
from shared.runtime.concurrency import bounded_map
from shared.storage.bucket_epoch import read_bucket_epoch
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, CasConflict, ObjectNotFound
from shared.storage.repository import Repository
from tripfold.console import printable
from tripfold.operate.command_line import (
    JSON_ITEMS_MAX,
    TABLE_ROWS_MAX,
    AsJson,
    FirstDate,
    LastDate,
    command_settings,
    console,
    date_range,
    make_table,
    open_bucket,
    print_json,
    progress_bar,
    run_command,
)

TRIES_MAX = 10

_LedgerRevisions = Mapping[tuple[CountrySlug, CityId], int]


class NotReprocessable(RuntimeError):
    """A city-day cannot be reprocessed. The message says why, and what to do."""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Selects city-days by dates, country and city (None: all).

    ``again`` also selects those that the present rules would read alike.
    """

    dates: Dates = Dates()
    country: CountrySlug | None = None
    city_id: CityId | None = None
    again: bool = False


class Reprocessed(msgspec.Struct, frozen=True, kw_only=True):
    """A reprocessed city-day: its totals before and after, or why it was refused and is unchanged.

    Without ``after`` and ``refused`` it was only published again. ``revision_after`` is None in a dry run.
    """

    date: dt.date
    city_id: CityId
    country: CountrySlug
    revision_before: int
    before: Contribution
    revision_after: int | None = None
    after: Contribution | None = None
    refused: str | None = None


class ReprocessedDate(msgspec.Struct, frozen=True, kw_only=True):
    """One reprocessed date: the numbers of its city-days and of bytes read, the results, and the run's progress."""

    date: dt.date
    city_days: int
    bytes_read: int
    reprocessed: list[Reprocessed]
    dates_done: int
    dates_total: int


def reprocess_command(
    first: FirstDate = None,
    last: LastDate = None,
    *,
    country: Annotated[str | None, typer.Option(metavar="SLUG", help="Only this country.")] = None,
    city: Annotated[str | None, typer.Option(metavar="ID", help="Only this city.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also files that the present rules should read alike.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read, print what would change, and write nothing.")] = (
        False
    ),
    as_json: AsJson = False,
) -> None:
    """Read stored files again that other parsing rules have read; exit 1 if one is refused.

    The rules are those of this build and the settings TRIPFOLD_INGEST_*. A file of which they make something else gets
    a new revision, which is published as if the file had been ingested again. The upstream is not asked, and services
    keep running. A run that was stopped continues where it stopped.

    Example: tripfold reprocess --from 2024-05-01 --to 2024-05-31 --dry-run

    Example: tripfold reprocess --country armenia --city 7
    """
    selection = Selection(
        dates=Dates(*date_range(first, last)),
        country=None if country is None else CountrySlug(country),
        city_id=None if city is None else CityId(city),
        again=again,
    )
    settings = command_settings()

    async def run() -> tuple[int, int, list[Reprocessed]]:
        city_days = total_bytes = 0
        results: list[Reprocessed] = []
        with ThreadPoolExecutor(settings.ingest_streams, thread_name_prefix="parse") as threads:
            async with open_bucket(settings) as store, KafkaPublisher(settings, source="reprocess") as publisher:
                await publisher.check()
                job = Reprocess(
                    store,
                    publisher,
                    clock=utc_now,
                    rules=settings.file_rules,
                    threads=threads,
                    streams=settings.ingest_streams,
                    dry_run=dry_run,
                )
                with progress_bar("reprocessing", "dates") as show:
                    async for one in job.run(selection):
                        city_days += one.city_days
                        total_bytes += one.bytes_read
                        results += one.reprocessed
                        show(one.dates_done, one.dates_total, f", {city_days:,} city-days, {total_bytes:,} bytes")
        return city_days, total_bytes, results

    city_days, total_bytes, results = run_command(run())
    refused = sum(one.refused is not None for one in results)
    changed = sum(one.after is not None for one in results)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "city_days": city_days,
                "bytes_read": total_bytes,
                "reprocessed": changed,
                "refused": refused,
                "found": results[:JSON_ITEMS_MAX],
            }
        )
    else:
        if results:
            console.print(_table_of(results))
        verb = "would get" if dry_run else "got"
        console.print(
            f"{changed:,} of {city_days:,} city-days {verb} a new revision, {refused:,} refused, "
            f"{len(results) - changed - refused:,} only published again; {total_bytes:,} bytes read."
        )
    if refused:
        raise typer.Exit(1)


def _table_of(results: Iterable[Reprocessed]) -> Table:
    table = make_table("date", "country", "city", "revision", "trips", "passengers", "accidents", "delay ms", "")
    for number, one in enumerate(results):
        if number == TABLE_ROWS_MAX:
            table.caption = f"the first {TABLE_ROWS_MAX:,}; --json prints up to {JSON_ITEMS_MAX:,}"
            break
        revision = _arrow(one.revision_before, one.revision_after)
        remark = f"unchanged: {printable(one.refused)}" if one.refused else "" if one.after else "published again"
        table.add_row(str(one.date), one.country, one.city_id, revision, *_sums(one.before, one.after), remark)
    return table


def _sums(before: Contribution, after: Contribution | None) -> list[str]:
    fields = ("trips", "passengers", "accidents", "delay_total_ms")
    return [_arrow(getattr(before, field), getattr(after, field) if after else None) for field in fields]


def _arrow(before: int, after: int | None) -> str:
    return str(before) if after is None or after == before else f"{before} → {after}"


class _DiscardingUpload:
    """An upload that discards its bytes, as they are already stored."""

    async def write(self, chunk: bytes) -> None:
        del chunk

    async def complete(self) -> None:
        return

    async def abort(self) -> None:
        return


class Reprocess:
    """Reprocesses the city-days of a selection."""

    def __init__(
        self,
        store: AdminObjectStore,
        publisher: Publisher,
        *,
        clock: Callable[[], dt.datetime],
        rules: FileRules,
        threads: Executor,
        streams: int,
        dry_run: bool = False,
    ) -> None:
        self._store = store
        self._repository = Repository(store)
        self._publisher = publisher
        self._clock = clock
        self._rules = rules
        self._threads = threads
        self._streams = streams
        self._dry_run = dry_run
        self._bytes_read = 0

    async def run(self, selection: Selection) -> AsyncIterator[ReprocessedDate]:
        """Reprocess date by date. Started again, it continues where it stopped. Raises the errors of S3 and Kafka."""
        dates = await known_dates(self._store, selection.dates, keys.MANIFESTS)
        for done, date in enumerate(dates, 1):
            self._bytes_read = 0
            known = await self._ledger_revisions(date)
            manifests = await self._manifests(date, selection)
            results = await bounded_map(
                lambda key, known=known: self._city_day(key, selection, known),  # type: ignore[misc]  # binds the date's
                manifests,
                limit=self._streams,
            )
            yield ReprocessedDate(
                date=date,
                city_days=len(manifests),
                bytes_read=self._bytes_read,
                reprocessed=[result for result in results if result is not None],
                dates_done=done,
                dates_total=len(dates),
            )

    async def _manifests(self, date: dt.date, selection: Selection) -> list[str]:
        if selection.city_id is not None:
            return [keys.manifest(date, selection.city_id)]
        return [listed.key async for listed in self._store.list(keys.manifests_of(date))]

    async def _ledger_revisions(self, date: dt.date) -> _LedgerRevisions:
        revisions: dict[tuple[CountrySlug, CityId], int] = {}
        live = (await read_current(self._store)).live
        for country, found in (await read_summaries(self._store, live, date)).items():
            try:
                summary = objects.decode(Summary, found.body, keys.summary(live, date, country))
            except NewerObject:
                raise
            except CorruptObject:
                continue  # verify reports it; its cities are published again
            revisions |= {(country, city_id): entry.revision for city_id, entry in summary.ledger.items()}
        return revisions

    async def _city_day(self, key: str, selection: Selection, known: _LedgerRevisions) -> Reprocessed | None:
        """Reprocess one city-day. Return None if nothing changes."""
        for _ in range(TRIES_MAX):
            read = await self._repository.read(Manifest, key)
            if read is None or selection.country not in {None, read.value.country}:
                return None
            previous = read.value
            try:
                following = await self._next(previous, again=selection.again)
            except (FileRefused, NotReprocessable) as error:
                return _result(previous, refused=str(error))
            if following is None:
                behind = known.get((previous.country, previous.city_id), 0) < previous.revision
                return await self._published_again(key, previous) if behind else None
            if self._dry_run:
                return _result(previous, after=following.contribution)
            try:
                await self._repository.compare_and_swap(key, following, over=read)
            except CasConflict:
                continue  # another file was ingested, or this write succeeded and its response was lost
            await self._publish(key)
            return _result(previous, revision_after=following.revision, after=following.contribution)
        raise TooManyConflicts(f"other writers changed {key} {TRIES_MAX} times: try again later")

    async def _published_again(self, key: str, manifest: Manifest) -> Reprocessed | None:
        if self._dry_run:
            return None
        await self._publish(key)
        return _result(manifest)

    async def _next(self, previous: Manifest, *, again: bool) -> Manifest | None:
        """Return the next revision from the raw object. Return None if nothing is to read or changes."""
        if previous.rule_version > rule_version():
            raise NotReprocessable(
                f"its rules have version {previous.rule_version}; this build has version {rule_version()}: upgrade"
            )
        if not again and gives_same_totals(previous, self._rules):
            return None
        streamed = await self._read(previous)
        base = (await read_bucket_epoch(self._store, self._clock)).revision_floor
        return reprocessed(
            previous,
            streamed.totals,
            rules=self._rules,
            attempt=uuid.uuid4().hex,
            now=self._clock(),
            revision_floor=base,
        )

    async def _read(self, manifest: Manifest) -> StreamedFile:
        try:
            streamed = await stream_file(
                self._store.stream(manifest.raw_key),
                _DiscardingUpload(),
                date=manifest.date.isoformat(),
                rules=self._rules,
                progress=StreamProgress(),
                threads=self._threads,
            )
        except ObjectNotFound as error:
            if manifest.raw_expired:
                raise NotReprocessable(
                    f"its raw object has expired: 'tripfold expire raw' deleted the files from before "
                    f"{manifest.raw_expired_before:%Y-%m-%d}. Request {manifest.date} again to download the file"
                ) from error
            raise NotReprocessable(f"its raw object {manifest.raw_key} is lost") from error
        self._bytes_read += streamed.size_bytes
        if streamed.sha256 != manifest.sha256:
            raise NotReprocessable(
                f"its raw object {manifest.raw_key} has changed since it was stored: run 'tripfold verify --deep'"
            )
        return streamed

    async def _publish(self, key: str) -> None:
        await publish_as_stored(
            self._store,
            self._publisher,
            key,
            lambda body: events_of_manifest(objects.decode(Manifest, body, key)),
        )


def _result(
    previous: Manifest,
    *,
    revision_after: int | None = None,
    after: Contribution | None = None,
    refused: str | None = None,
) -> Reprocessed:
    return Reprocessed(
        date=previous.date,
        city_id=previous.city_id,
        country=previous.country,
        revision_before=previous.revision,
        before=previous.contribution,
        revision_after=revision_after,
        after=after,
        refused=refused,
    )
