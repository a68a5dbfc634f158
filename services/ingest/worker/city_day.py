"""The ingest of one city-day.

The order of effects:

1. read the manifest; if this task's request already made its revision, go on at 7: no download; if the request was
   cancelled meanwhile, go on at 8: the city is skipped;
2. ask the upstream, on condition that the file changed; unconditionally if the stored raw object is lost, which the
   same bytes replace as a next revision;
3. stream it to a raw key of this attempt's own, hashed, validated and folded as the bytes pass, while a note says that
   this attempt is being parsed (``attempts.py``);
4. decide: refused (the file goes to quarantine, ``quarantine.py``; go on at 8), unchanged (the upload is aborted), or a
   next revision;
5. complete the upload;
6. swap the manifest in; lost the race → start again at 1, and leave the raw object to the clean-up;
7. publish what the manifest says, also when nothing changed, and when an earlier end of this task waits for it;
8. publish ``CityFinished``;
9. commit (by the caller).

If the upstream breaks or is down in 2 or 3, the task is published again instead, to be tried later (``retrying.py``),
and 9 follows. A file over which workers have died is parsed only when the caller runs nothing else.

The manifest is the outbox: a crash anywhere leaves a task that comes again and finds in it what to publish.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor

import msgspec
import structlog

from services.ingest.cancellation import CANCELLED, RequestCancelled, read_cancelled, read_record
from services.ingest.parsing.parser import DEFAULT_RULES, FileRules, total_trip_file
from services.ingest.planner.planner import read_plan
from services.ingest.upstream.client import (
    Download,
    PermanentUpstreamError,
    TransientUpstreamError,
    Upstream,
    UpstreamDown,
    UpstreamRetryPolicy,
)
from services.ingest.worker.attempts import ALONE_AFTER, ALONE_DEATHS_MAX, Attempts
from services.ingest.worker.manifest import NewFile, Place, next_manifest, validators_of
from services.ingest.worker.quarantine import Arrived, Quarantine
from services.ingest.worker.streaming import FileRefused, Meter, Streamed, deadly_file, stream_file
from services.ingest.worker.task_retries import tried_again
from shared.domain import keys, objects
from shared.domain.events import Cause, CityFinished, CityProgressed, Event, IngestCity, Outcome, Published
from shared.domain.ids import RequestId
from shared.domain.objects import Manifest
from shared.domain.outbox import events_of_manifest
from shared.domain.requests import is_awaited
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaUnavailable, Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime import metrics
from shared.storage.bucket_epoch import read_bucket_epoch
from shared.storage.object_store import CasConflict, ObjectStore, Upload
from shared.storage.repository import Repository

PROGRESS_INTERVAL_S = 1.0

_log = structlog.get_logger()


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """How a city-day ended: a manifest to publish, or the reason that there is none, and where a refused file lies."""

    outcome: Outcome
    manifest: Manifest | None = None
    reason: str | None = None
    quarantine_key: str | None = None


class _NotAlone(Exception):  # no error: the caller carries the task out later
    """The file has to be parsed alone, and others may be parsed beside it now."""


class CityDayIngest:
    """Ingests city-days. Any number can run side by side, also of one city-day: the manifest's swap decides."""

    def __init__(
        self,
        store: ObjectStore,
        publisher: Publisher,
        upstream: Upstream,
        *,
        clock: Callable[[], dt.datetime],
        retry_policy: UpstreamRetryPolicy,
        threads: Executor,
        deadline_s: float,
        rules: FileRules = DEFAULT_RULES,
        raw_retention: dt.timedelta | None = None,
        mint_attempt: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._upstream = upstream
        self._clock = clock
        self._persistence = retry_policy
        self._threads = threads
        self._deadline_s = deadline_s
        self._rules = rules
        self._raw_retention = raw_retention
        self._mint_attempt = mint_attempt
        self._attempts = Attempts(store, clock=clock)
        self._quarantine = Quarantine(store, clock=clock)

    async def run(self, tasks: Sequence[IngestCity], *, alone: bool) -> bool:
        """Ingest one city-day, for all the tasks that ask for it. When it returns True, they can be committed.

        False: the file has to be parsed while this process parses nothing else; ``alone`` says that it does so now.

        The last task of the highest plan is the one that is carried out; what it finds is published for each of them.
        """
        # Not the first: it may come again, and its file have been corrected before the last was asked for.
        chosen = max(reversed(tasks), key=lambda task: task.plan_revision)
        log = _log.bind(date=str(chosen.date), city_id=chosen.city_id, request_id=chosen.request_id)
        began_at = self._clock()
        try:
            finished = await self._persistence.once(
                lambda: self._ingest(chosen, tasks, alone=alone),
                down_s=min((began_at - (task.down_since or began_at)).total_seconds() for task in tasks),
            )
        except _NotAlone:
            return False
        except (TransientUpstreamError, UpstreamDown) as fault:
            log.info("city is tried again later", reason=str(fault))
            for task in tasks:
                await self._try_later(task, fault, began_at)
            return True
        except RequestCancelled as cancelled:
            finished = Finished(outcome=Outcome.SKIPPED, reason=str(cancelled))
        except PermanentUpstreamError as error:
            finished = Finished(outcome=Outcome.FAILED, reason=str(error)[:2_000])
        log.info(
            "city finished",
            outcome=finished.outcome.value,
            reason=finished.reason,
            quarantine_key=finished.quarantine_key,
        )
        for task in tasks:
            await self._end(task, finished)
        return True

    async def _try_later(
        self, task: IngestCity, fault: TransientUpstreamError | UpstreamDown, began_at: dt.datetime
    ) -> None:
        """Publish a task to be tried later, or end it if it was tried for long enough."""
        try:
            later = tried_again(
                task,
                fault,
                began_at=began_at,
                now=self._clock(),
                attempts_max=self._persistence.attempts_max,
                outage_limit_s=self._persistence.outage_limit_s,
            )
        except PermanentUpstreamError as error:
            _log.info("city finished", request_id=task.request_id, outcome="failed", reason=str(error))
            await self._end(task, Finished(outcome=Outcome.FAILED, reason=str(error)[:2_000]))
        else:
            await self._publisher.publish([OutgoingEvent(later, topic=Topic.CITY_TASK_RETRIES)])

    async def _end(self, task: IngestCity, finished: Finished) -> None:
        if finished.manifest is None:
            await self._publish_awaited(task)
        await self._publish(task, finished)

    async def _publish_awaited(self, task: IngestCity) -> None:
        """Publish again what an earlier end of this task still waits to see folded, now that it would end without.

        A compaction can have taken those records before they were folded, and the earlier end is the one that counts.
        """
        record = await read_record(self._store, task.request_id)
        if record is None or record.plan_revision != task.plan_revision or not is_awaited(record, task.position):
            return
        key = keys.manifest(task.date, task.city_id)
        found = await self._store.get(key)
        if found is not None:
            await self._publish_events(task, events_of_manifest(objects.decode(Manifest, found.body, key)))

    async def _publish_events(self, task: IngestCity, events: Iterable[Event]) -> None:
        cause = Cause(request_id=task.request_id, plan_revision=task.plan_revision, position=task.position)
        await self._publisher.publish(OutgoingEvent(event, cause) for event in events)

    async def _publish(self, task: IngestCity, finished: Finished) -> None:
        manifest = finished.manifest
        events = events_of_manifest(manifest) if manifest else ()
        await self._publish_events(task, events)
        ended = CityFinished(
            request_id=task.request_id,
            date=task.date,
            city_id=task.city_id,
            city_name=task.city_name,
            plan_revision=task.plan_revision,
            position=task.position,
            outcome=finished.outcome,
            reason=finished.reason,
            size_bytes=manifest.size_bytes if manifest else 0,
            trips=manifest.contribution.trips if manifest else 0,
            published=tuple(Published(country=event.country, revision=event.revision) for event in events),
            quarantine_key=finished.quarantine_key,
            retried_at=task.retried_at,
        )
        await self._publisher.publish([OutgoingEvent(ended)])

    async def _ingest(self, task: IngestCity, tasks: Sequence[IngestCity], *, alone: bool) -> Finished:
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    finished = await self._try_once(task, {one.request_id for one in tasks}, alone=alone)
                    if finished is not None:
                        return finished
        except TimeoutError as error:
            raise TransientUpstreamError(
                f"the city-day took longer than its deadline of {self._deadline_s:.0f} s"
            ) from error

    async def _try_once(self, task: IngestCity, wanted_by: Collection[RequestId], *, alone: bool) -> Finished | None:
        """Go through steps 1 to 6 once. Returns None if the race for the manifest was lost.

        Raises RequestCancelled if all the requests that wanted the city-day were cancelled before it was begun.
        """
        key = keys.manifest(task.date, task.city_id)
        found = await self._store.get(key)
        previous = objects.decode(Manifest, found.body, key) if found else None
        etag = found.etag if found else None
        attempt = self._mint_attempt()
        if previous is not None and _made_for(previous, task):
            place = await self._place_after_move(previous)
            if place is None:
                return Finished(outcome=Outcome.STORED, manifest=previous)
            return await self._swap(key, etag, await self._next(previous, task, place, None, attempt))
        if await self._all_cancelled(wanted_by):
            if previous is None or previous.request_id not in wanted_by:
                raise RequestCancelled(CANCELLED)
            return Finished(outcome=Outcome.STORED, manifest=previous)  # it may not be published yet
        place = await self._place(task, previous)
        raw_lost = previous is not None and await self._is_raw_lost(previous)
        known = validators_of(
            None if raw_lost else previous, self._upstream.city_url(task.upstream_id, task.date), self._rules
        )
        async with self._upstream.download(task.upstream_id, task.date, known) as download:
            taken = await self._take(download, task, previous, place, attempt, raw_lost=raw_lost, alone=alone)
        return taken if isinstance(taken, Finished) else await self._swap(key, etag, taken)

    async def _take(
        self,
        download: Download,
        task: IngestCity,
        previous: Manifest | None,
        place: Place,
        attempt: str,
        *,
        raw_lost: bool,
        alone: bool,
    ) -> Manifest | Finished:
        """Do with an answer what is to be done; return the next revision, or how the city-day ended without one."""
        if download.chunks is None:
            return await self._next(previous, task, place, None, attempt) or _unchanged(previous)
        raw_key = keys.raw(task.date, task.city_id, attempt)
        upload = self._store.upload(raw_key)
        try:
            streamed = await self._stream(task, download, upload, attempt, alone=alone)
            file = NewFile(
                raw_key=raw_key,
                url=download.url,
                validators=download.validators,
                streamed=streamed,
                replaces_lost=raw_lost,
            )
            manifest = await self._next(previous, task, place, file, attempt)
            if manifest is None:
                return _unchanged(previous)
            if manifest.raw_key == raw_key:
                await upload.complete()
        except FileRefused as refused:
            arrived = Arrived(url=download.url, validators=download.validators, attempt=attempt, raw_key=raw_key)
            report = await self._quarantine.keep(refused, task, arrived, upload)
            return Finished(outcome=Outcome.FAILED, reason=report.reason, quarantine_key=report.key)
        else:
            return manifest
        finally:
            await upload.abort()

    async def _stream(
        self, task: IngestCity, download: Download, upload: Upload, attempt: str, *, alone: bool
    ) -> Streamed:
        """Pass the file through, noted as being parsed for so long. Raises FileRefused if it is no trip file.

        Raises _NotAlone for a file over which workers have died, unless it is ``alone``.
        """
        assert download.chunks is not None, "an unchanged file is not streamed"
        settled = False
        try:
            died = await self._attempts.begin(task.date, task.city_id, attempt, alone=alone)
            if died.all >= ALONE_AFTER and not alone:
                raise _NotAlone
            deadly = died.alone >= ALONE_DEATHS_MAX
            async with self._reported(task, download) as meter:
                streamed = await stream_file(
                    download.chunks,
                    upload,
                    date=task.date.isoformat(),
                    rules=self._rules,
                    meter=meter,
                    threads=self._threads,
                    fold=deadly_file(died.all, died.alone) if deadly else total_trip_file,
                )
            settled = True
        except FileRefused:
            settled = True
            raise
        finally:
            await self._attempts.end(task.date, task.city_id, attempt, settled=settled)
        metrics.bad_records.inc(streamed.folded.bad_records)
        return streamed

    async def _is_raw_lost(self, manifest: Manifest) -> bool:
        """Tell whether a raw object is missing that was not to expire yet."""
        if self._raw_retention is not None and self._clock() - manifest.raw_stored_at > self._raw_retention:
            return False
        return await self._store.get(manifest.raw_key, first_bytes=1) is None

    async def _all_cancelled(self, request_ids: Collection[RequestId]) -> bool:
        for request_id in sorted(request_ids):
            if await read_cancelled(self._store, request_id) is None:
                return False
        return True

    async def _next(
        self, previous: Manifest | None, task: IngestCity, place: Place, file: NewFile | None, attempt: str
    ) -> Manifest | None:
        epoch = await read_bucket_epoch(self._store, self._clock)
        return next_manifest(
            previous, task, place, file, rules=self._rules, attempt=attempt, now=self._clock(), base=epoch.base
        )

    async def _swap(self, key: str, etag: str | None, manifest: Manifest | None) -> Finished | None:
        assert manifest is not None
        try:
            await self._store.compare_and_swap(key, objects.encode(manifest), etag=etag)
        except CasConflict:
            metrics.cas_conflicts.labels("manifest").inc()
            current = await Repository(self._store).get(Manifest, key)
            # A swap whose answer was lost may have happened, and others may have built on it.
            if current is None or not current.made_by(manifest.attempt):
                return None
            manifest = current
        if manifest.retracted and await self._place_after_move(manifest) is not None:
            return None
        return Finished(outcome=Outcome.STORED, manifest=manifest)

    async def _place(self, task: IngestCity, previous: Manifest | None) -> Place:
        """Choose the country: the task's own, unless it would undo what a newer plan says."""
        asked = Place(country=task.country, country_name=task.country_name, plan_revision=task.plan_revision)
        if previous is None or previous.country == task.country:
            return asked
        if task.plan_revision < previous.plan_revision:
            return _place_of(previous)
        return await self._place_in_newer_plan(task, task.plan_revision) or asked

    async def _place_after_move(self, manifest: Manifest) -> Place | None:
        """Return where the city belongs if a plan newer than a move says otherwise, or None if it stays.

        A task of that newer plan may have passed before the move was swapped in, and found nothing to do.
        """
        if not manifest.retracted:
            return None
        place = await self._place_in_newer_plan(manifest, manifest.plan_revision)
        return place if place is not None and place.country != manifest.country else None

    async def _place_in_newer_plan(self, city: IngestCity | Manifest, plan_revision: int) -> Place | None:
        plan = await read_plan(self._store, city.date)
        if plan is None or plan.revision <= plan_revision:
            return None
        for country, planned in plan.countries.items():
            if any(one.city_id == city.city_id for one in planned.cities):
                return Place(country=country, country_name=planned.name, plan_revision=plan.revision)
        return None

    @contextlib.asynccontextmanager
    async def _reported(self, task: IngestCity, download: Download) -> AsyncIterator[Meter]:
        """Publish how far the stream is, once a second while it lasts. Nothing depends on these events."""
        meter = Meter()
        meter.bytes_total = download.bytes_total

        async def report() -> None:
            while True:
                await asyncio.sleep(PROGRESS_INTERVAL_S)
                progressed = CityProgressed(
                    request_id=task.request_id,
                    date=task.date,
                    city_id=task.city_id,
                    plan_revision=task.plan_revision,
                    position=task.position,
                    bytes_done=meter.bytes_done,
                    bytes_total=meter.bytes_total,
                    trips_done=meter.trips_done,
                )
                with contextlib.suppress(KafkaUnavailable):
                    await self._publisher.publish([OutgoingEvent(progressed)])

        reporting = asyncio.create_task(report())
        try:
            yield meter
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)


def _made_for(manifest: Manifest, task: IngestCity) -> bool:
    """Tell whether the task's own request made this revision, and the task asks for no move since."""
    settled = manifest.country == task.country or manifest.plan_revision >= task.plan_revision
    return manifest.request_id == task.request_id and settled


def _place_of(manifest: Manifest) -> Place:
    return Place(country=manifest.country, country_name=manifest.country_name, plan_revision=manifest.plan_revision)


def _unchanged(previous: Manifest | None) -> Finished:
    assert previous is not None
    return Finished(outcome=Outcome.UNCHANGED, manifest=previous)
