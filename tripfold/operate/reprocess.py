"""Reading stored raw objects again under the present parsing rules, and swapping in what they add up to.

The order of effects is a worker's, without the upstream: read the manifest, stream its raw object, swap the next
revision in, publish it. A file ingested meanwhile makes the swap fail, and its manifest is looked at instead. A
manifest that is already of the present rules is published if its summary does not know it yet: so a reprocess that was
ended after a swap goes on where it stopped.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor

import msgspec

from services.aggregate.audit.repair import TooManyConflicts
from services.aggregate.bucket_reader import Dates, known_dates, read_summaries
from services.aggregate.summary_writer import publish_as_stored
from services.ingest.parsing.trips import RULE_VERSION
from services.ingest.worker.manifest import gives_same_totals, reprocessed
from services.ingest.worker.streaming import FileRefused, StreamedFile, StreamProgress, stream_file
from shared.domain import keys, objects
from shared.domain.contribution import Contribution
from shared.domain.file_rules import FileRules
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import CorruptObject, Manifest, NewerObject, Summary
from shared.domain.outbox import events_of_manifest
from shared.kafka.producer import Publisher
from shared.runtime.concurrency import bounded_map
from shared.storage.bucket_epoch import read_bucket_epoch
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, CasConflict, ObjectNotFound
from shared.storage.repository import Repository

TRIES_MAX = 10

_LedgerRevisions = Mapping[tuple[CountrySlug, CityId], int]


class NotReprocessable(RuntimeError):
    """A city-day cannot be read again; the message says why, and what to do."""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which city-days are read again: of a range of dates, of one country or city (None: of all).

    With ``again`` also those of which the present rules would make the same.
    """

    dates: Dates = Dates()
    country: CountrySlug | None = None
    city_id: CityId | None = None
    again: bool = False


class Reprocessed(msgspec.Struct, frozen=True, kw_only=True):
    """A city-day that was read again: what it added up to before and what now, or why it was left as it was.

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
    """What was done for one date: how many city-days were looked at and bytes read, and those that were not as told."""

    date: dt.date
    city_days: int
    bytes_read: int
    reprocessed: list[Reprocessed]
    dates_done: int
    dates_total: int


class _Discarded:
    """An upload that keeps nothing: what is read is stored already."""

    async def write(self, chunk: bytes) -> None:
        del chunk

    async def complete(self) -> None:
        return

    async def abort(self) -> None:
        return


class Reprocess:
    """One reprocess of the city-days of a selection."""

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
        """Reprocess date by date. Raises what S3 and Kafka raise; started again it goes on where it stopped."""
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
                continue  # for verify to tell; its cities are published again
            revisions |= {(country, city_id): entry.revision for city_id, entry in summary.ledger.items()}
        return revisions

    async def _city_day(self, key: str, selection: Selection, known: _LedgerRevisions) -> Reprocessed | None:
        """Read one city-day again; None if there is nothing to tell of it."""
        for _ in range(TRIES_MAX):
            read = await self._repository.read(Manifest, key)
            if read is None or selection.country not in {None, read.value.country}:
                return None
            previous = read.value
            try:
                following = await self._next(previous, again=selection.again)
            except (FileRefused, NotReprocessable) as error:
                return _told(previous, refused=str(error))
            if following is None:
                behind = known.get((previous.country, previous.city_id), 0) < previous.revision
                return await self._published_again(key, previous) if behind else None
            if self._dry_run:
                return _told(previous, after=following.contribution)
            try:
                await self._repository.compare_and_swap(key, following, over=read)
            except CasConflict:
                continue  # another file came in, or our own swap happened and its answer was lost
            await self._publish(key)
            return _told(previous, revision_after=following.revision, after=following.contribution)
        raise TooManyConflicts(f"{key} was written by others {TRIES_MAX} times: try again later")

    async def _published_again(self, key: str, manifest: Manifest) -> Reprocessed | None:
        if self._dry_run:
            return None
        await self._publish(key)
        return _told(manifest)

    async def _next(self, previous: Manifest, *, again: bool) -> Manifest | None:
        """Return the revision that the raw object stands for; None if nothing has to be read, or it says the same."""
        if previous.rule_version > RULE_VERSION:
            raise NotReprocessable(
                f"it was read by rules of version {previous.rule_version}; this build has {RULE_VERSION}: upgrade it"
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
                _Discarded(),
                date=manifest.date.isoformat(),
                rules=self._rules,
                progress=StreamProgress(),
                threads=self._threads,
            )
        except ObjectNotFound as error:
            raise NotReprocessable(f"its raw object {manifest.raw_key} is lost") from error
        self._bytes_read += streamed.size_bytes
        if streamed.sha256 != manifest.sha256:
            raise NotReprocessable(
                f"its raw object {manifest.raw_key} is not what was stored: see 'tripfold verify --deep'"
            )
        return streamed

    async def _publish(self, key: str) -> None:
        await publish_as_stored(
            self._store,
            self._publisher,
            key,
            lambda body: events_of_manifest(objects.decode(Manifest, body, key)),
        )


def _told(
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
