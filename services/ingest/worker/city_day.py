"""Ingests one city-day: fetches its file, stores it, and publishes its statistics.

The order of effects:

1. read the manifest. If this task's request already wrote its revision, go on at 7 without a download. If the request
   was cancelled meanwhile, skip the city: go on at 8;
2. send a conditional request to the upstream. If the stored raw object is lost, send an unconditional one: the same
   bytes then replace the lost object as a new revision. A file that may replace a stored one is requested under a write
   intent: if the manifest has none, write one (compare-and-swap), and start again at 1;
3. stream the file to a raw key of this attempt, and hash, check and total it. Meanwhile a note says that this process
   parses it (``attempts.py``);
4. decide. An invalid file goes to quarantine (``quarantine.py``): go on at 8. If the file is unchanged, abort the
   upload, and confirm that the manifest is unchanged too: remove a write intent (compare-and-swap), or compare the
   ETag. If it has changed, start again at 1; otherwise go on at 7. A changed file becomes the next revision. Judge its
   volume (``volume_check.py``);
5. complete the upload;
6. write the manifest by compare-and-swap. After a conflict start again at 1, and leave the raw object to gc;
7. publish the events of the manifest. Do so also if nothing changed, or if an earlier run of this task still waits for
   them to be folded;
8. publish ``CityFinished``;
9. remove the note, and commit (by the caller).

If the upstream fails or is down in 2 or 3, publish the task again for a later attempt (`services.ingest.retries`), and
go on at 9. Only the time that the worker waits for the upstream counts for its deadline (``upstream_clock.py``). A task
whose file may have crashed another process runs in a process of its own (``isolation.py``).

A task whose source is the bucket reads the manifest's raw object instead of 2 and 3. It stores no raw object, and makes
the next revision if the present rules give other totals. A file that cannot be read again fails, and its numbers stay.

A write intent orders the reads of the upstream. A worker can pause between its request and its compare-and-swap while
the upstream takes the change back. A check that finds the file unchanged then removes the intent, or ended before the
intent was written. In the first case the compare-and-swap of the paused worker fails. In the second case its request is
later than that of the check. So no file replaces what a later request has found.

The manifest is the outbox. After a crash at any step Kafka redelivers the task, and the manifest says what to publish.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor
from functools import partial

import msgspec
import structlog
from msgspec import UNSET

from services.ingest.parsing.parser import DEFAULT_RULES, FileRules, total_trip_file
from services.ingest.parsing.trips import rule_version
from services.ingest.retries import next_attempt
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from services.ingest.upstream.port import Download, Upstream
from services.ingest.upstream.retry import UpstreamRetryPolicy
from services.ingest.worker.attempts import Attempts
from services.ingest.worker.isolation import CRASHES_MAX, Isolation
from services.ingest.worker.manifest import (
    NewFile,
    Place,
    gives_same_totals,
    is_unchanged,
    next_manifest,
    reprocessed,
    validators_of,
)
from services.ingest.worker.quarantine import FileSource, Quarantine
from services.ingest.worker.stream_slots import NoFreeSlot, StreamSlots
from services.ingest.worker.streaming import (
    FileRefused,
    StreamedFile,
    StreamProgress,
    refuse_crashing_file,
    stream_file,
)
from services.ingest.worker.upstream_clock import UpstreamClock
from services.ingest.worker.volume_check import SuspiciousFile, VolumeCheck
from shared.domain import keys
from shared.domain.events import Cause, CityFinished, CityProgressed, Event, IngestCity, Outcome, Published, Source
from shared.domain.objects import REMEDY, CorruptObject, Manifest
from shared.domain.outbox import events_of_manifest
from shared.domain.requests import is_awaited
from shared.domain.topics import Topic
from shared.domain.volume import VolumeRules
from shared.kafka.producer import KafkaUnavailable, Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime import metrics
from shared.runtime.settings import ATTEMPT_LIMIT_TIMES
from shared.storage.bucket_epoch import read_bucket_epoch
from shared.storage.object_store import CasConflict, ObjectNotFound, ObjectStore, StoreUnavailable, Upload
from shared.storage.repository import (
    Repository,
    Versioned,
    read_cancelled_record,
    read_plan,
    read_request_record,
)

PROGRESS_INTERVAL_S = 1.0
_NO_SLOT = contextlib.nullcontext()
SLOT_WAIT_MAX_S = 20.0
"""How long an open response waits for a stream slot. Many servers close a connection that nobody reads for a minute."""

_log = structlog.get_logger()


class CityResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result for a city-day: a manifest to publish or the reason for none, and the key of a refused file."""

    outcome: Outcome
    manifest: Manifest | None = None
    reason: str | None = None
    quarantine_key: str | None = None


class _MustBeIsolated(Exception):  # no error: the task then runs in a process of its own
    """The file may have crashed another process."""


class _RequestCancelled(Exception):  # no error: the worker skips the city
    """The request was cancelled before the city-day was started."""


class _NotReprocessable(Exception):  # no error of ours: the city fails with this reason
    """The stored file cannot be read again. The message says why, and what to do."""


class CityDayIngest:
    """Ingests city-days. Workers can run in parallel, even on one city-day: the manifest's compare-and-swap decides.

    A process with ``isolation`` notes its attempts, and leaves files that may crash it to processes of their own. Such
    a process has none: ``crashes`` of them have crashed over its file.
    """

    def __init__(
        self,
        store: ObjectStore,
        publisher: Publisher,
        upstream: Upstream,
        *,
        clock: Callable[[], dt.datetime],
        retry_policy: UpstreamRetryPolicy,
        threads: Executor,
        streams: int,
        background_streams: int = 1,
        deadline_s: float,
        rules: FileRules = DEFAULT_RULES,
        volume_rules: VolumeRules | None = None,
        isolation: Isolation | None = None,
        crashes: int = 0,
        mint_attempt: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._store = store
        self._repository = Repository(store)
        self._publisher = publisher
        self._upstream = upstream
        self._clock = clock
        self._retry_policy = retry_policy
        self._threads = threads
        self._streams = StreamSlots(streams, background=background_streams)
        self._deadline_s = deadline_s
        self._rules = rules
        self._isolation = isolation
        self._crashes = crashes
        self._mint_attempt = mint_attempt
        self._attempts = Attempts(store, clock=clock)
        self._quarantine = Quarantine(store, clock=clock)
        self._volume_check = VolumeCheck(store, volume_rules)

    async def run(self, task: IngestCity) -> None:
        """Ingest one city-day. Afterwards `end_attempt` it; the task can then be committed."""
        from_bucket = task.source is Source.BUCKET
        holds_slot = from_bucket
        while True:
            try:
                async with self._streams.hold(background=task.background is not UNSET) if holds_slot else _NO_SLOT:
                    began_at = self._clock()
                    down_s = (began_at - (task.down_since or began_at)).total_seconds()
                    ingest = partial(self._ingest, task, holds_slot=holds_slot)
                    finished = await (ingest() if from_bucket else self._retry_policy.run_once(ingest, down_s=down_s))
            except NoFreeSlot:
                holds_slot = True
                task = msgspec.structs.replace(task, down_since=None)  # the upstream has responded
                continue
            except _MustBeIsolated:
                assert self._isolation is not None, "an isolated process parses each file itself"
                await self._isolation.run(msgspec.structs.replace(task, down_since=None))
                self._attempts.adopt(task.date, task.city_id)
                return
            except (TransientUpstreamError, UpstreamDown) as fault:
                _log.info("city_retry_scheduled", error=str(fault))
                await self._retry_later(task, fault, began_at)
                return
            except _RequestCancelled:
                finished = CityResult(outcome=Outcome.SKIPPED, reason="the request was cancelled")
            except PermanentUpstreamError as error:
                finished = CityResult(outcome=Outcome.FAILED, reason=str(error)[:2_000])
            except CorruptObject as error:
                if not error.harms_alone:
                    raise  # the batch waits
                _log.error("object_unreadable", key=error.key, error=str(error))
                finished = CityResult(outcome=Outcome.FAILED, reason=f"{str(error)[:1_800]}. {REMEDY}")
            await self._end(task, finished)
            return

    async def end_attempt(self, task: IngestCity) -> None:
        """Remove the note that this process parses the city-day's file, if there is one."""
        await self._attempts.end(task.date, task.city_id)

    async def _retry_later(
        self, task: IngestCity, fault: TransientUpstreamError | UpstreamDown, began_at: dt.datetime
    ) -> None:
        """Publish a task for a later attempt, or end it after the last attempt."""
        try:
            later = next_attempt(
                task,
                fault,
                began_at=began_at,
                now=self._clock(),
                attempts_max=self._retry_policy.attempts_max,
                outage_limit_s=self._retry_policy.outage_limit_s,
            )
        except PermanentUpstreamError as error:
            await self._end(task, CityResult(outcome=Outcome.FAILED, reason=str(error)[:2_000]))
        else:
            await self._publisher.publish([OutgoingEvent(later, topic=Topic.RETRIES)])

    async def _end(self, task: IngestCity, finished: CityResult) -> None:
        _log.info(
            "city_ingested",
            outcome=finished.outcome.value,
            error=finished.reason,
            quarantine_key=finished.quarantine_key,
            suspicious=finished.manifest.suspicious if finished.manifest else None,
        )
        with metrics.time_stage("publish"):
            if finished.manifest is None:
                await self._publish_awaited(task)
            await self._publish(task, finished)
        metrics.city_tasks_finished.labels(finished.outcome.value).inc()

    async def _publish_awaited(self, task: IngestCity) -> None:
        """Publish the manifest again if an earlier run of this task still waits for its events to be folded.

        Compaction may have removed those records before they were folded, and the earlier run's result counts.
        """
        try:
            record = await read_request_record(self._store, task.request_id)
            if record is None or record.plan_revision != task.plan_revision or not is_awaited(record, task.position):
                return
            manifest = await self._repository.get(Manifest, keys.manifest(task.date, task.city_id))
        except CorruptObject as error:
            if not error.harms_alone:
                raise
            _log.error("object_unreadable", key=error.key, error=str(error))
            return  # nothing can be published before it is mended
        if manifest is not None:
            await self._publish_events(task, events_of_manifest(manifest))

    async def _publish_events(self, task: IngestCity, events: Iterable[Event]) -> None:
        cause = Cause(request_id=task.request_id, plan_revision=task.plan_revision, position=task.position)
        await self._publisher.publish(OutgoingEvent(event, cause) for event in events)

    async def _publish(self, task: IngestCity, finished: CityResult) -> None:
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

    async def _ingest(self, task: IngestCity, *, holds_slot: bool) -> CityResult:
        clock = UpstreamClock(self._deadline_s)
        limit_s = ATTEMPT_LIMIT_TIMES * self._deadline_s
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    finished = await self._try_once(task, clock, holds_slot=holds_slot)
                    if finished is not None:
                        return finished
        except TimeoutError as error:
            raise StoreUnavailable(f"S3 was so slow that the city-day took longer than {limit_s:.0f} s") from error

    async def _try_once(self, task: IngestCity, clock: UpstreamClock, *, holds_slot: bool) -> CityResult | None:
        """Take steps 1 to 6 once. Returns None to start again at 1.

        Raises _RequestCancelled if the request was cancelled before the city-day was started, and NoFreeSlot if a
        response waits too long for a slot.
        """
        stored = await self._repository.read(Manifest, keys.manifest(task.date, task.city_id))
        previous = stored.value if stored else None
        attempt = self._mint_attempt()
        if previous is not None and _made_for(previous, task):
            place = await self._place_after_move(previous)
            if place is None:
                return CityResult(outcome=Outcome.STORED, manifest=previous)
            return await self._swap(stored, await self._next(previous, task, place, None, attempt))
        if await read_cancelled_record(self._store, task.request_id) is not None:
            if previous is None or previous.request_id != task.request_id:
                raise _RequestCancelled
            return CityResult(outcome=Outcome.STORED, manifest=previous)  # perhaps not published yet
        if task.source is Source.BUCKET:
            return await self._reprocess(task, stored, attempt)
        return await self._check_upstream(task, stored, attempt, clock, holds_slot=holds_slot)

    async def _check_upstream(
        self,
        task: IngestCity,
        stored: Versioned[Manifest] | None,
        attempt: str,
        clock: UpstreamClock,
        *,
        holds_slot: bool,
    ) -> CityResult | None:
        """Take steps 2 to 6. Returns None to start again at 1."""
        previous = stored.value if stored else None
        place = await self._place(task, previous)
        raw_lost = previous is not None and await self._is_raw_lost(previous)
        known = validators_of(
            None if raw_lost else previous, self._upstream.city_url(task.upstream_id, task.date), self._rules
        )
        undeclared = stored if stored and stored.value.write_intent is UNSET else None
        if undeclared and known is None:
            await self._declare_intent(undeclared, attempt)
            return None
        async with contextlib.AsyncExitStack() as stack:
            clock.begin_request()
            with metrics.time_stage("request"):
                async with clock:
                    download = await stack.enter_async_context(
                        self._upstream.download(task.upstream_id, task.date, known)
                    )
            if undeclared and download.chunks is not None:
                await self._declare_intent(undeclared, attempt)
                return None
            # The slot is taken after the response has arrived: a slow upstream holds no slot while it does not respond.
            # If no slot becomes free soon, the file is requested again when the task holds one.
            if download.chunks is not None:
                if not holds_slot:
                    await stack.enter_async_context(
                        self._streams.hold(wait_max_s=SLOT_WAIT_MAX_S, background=task.background is not UNSET)
                    )
                chunks = clock.chunks(download.chunks)
                download.chunks = await stack.enter_async_context(contextlib.aclosing(chunks))
            taken = await self._take(download, task, previous, place, attempt, raw_lost=raw_lost)
        if taken is None:
            return await self._confirm_unchanged(stored)
        return taken if isinstance(taken, CityResult) else await self._swap(stored, taken)

    async def _declare_intent(self, stored: Versioned[Manifest], attempt: str) -> None:
        """Write into the manifest that a file may replace it. The caller starts again, also after a conflict."""
        intended = msgspec.structs.replace(stored.value, write_intent=attempt)
        try:
            await self._repository.compare_and_swap(_key_of(intended), intended, over=stored)
        except CasConflict:
            metrics.cas_conflicts.labels("manifest").inc()

    async def _confirm_unchanged(self, stored: Versioned[Manifest] | None) -> CityResult | None:
        """Return the result of an unchanged city-day, or None if another worker has changed its manifest since.

        From now on, no worker can replace the file by one that it requested before.
        """
        assert stored is not None, "only a stored file can be unchanged"
        manifest = stored.value
        if manifest.write_intent is UNSET:
            present = await self._store.get(_key_of(manifest), first_bytes=0)
            return _unchanged(manifest) if present is not None and present.etag == stored.etag else None
        manifest = msgspec.structs.replace(manifest, write_intent=UNSET)
        try:
            await self._repository.compare_and_swap(_key_of(manifest), manifest, over=stored)
        except CasConflict:
            metrics.cas_conflicts.labels("manifest").inc()
            return None
        return _unchanged(manifest)

    async def _reprocess(self, task: IngestCity, stored: Versioned[Manifest] | None, attempt: str) -> CityResult | None:
        """Total the stored raw object by the present rules. Returns None if another worker wrote the manifest first."""
        if stored is None:
            return CityResult(outcome=Outcome.SKIPPED, reason="no file of the city is stored")
        previous = stored.value
        again = task.background and task.background.again
        if not again and gives_same_totals(previous, self._rules):
            return _unchanged(previous)
        try:
            streamed = await self._read_again(task, previous)
        except _NotReprocessable as refused:
            return CityResult(outcome=Outcome.FAILED, reason=str(refused)[:2_000])
        following = reprocessed(
            previous,
            streamed.totals,
            request_id=task.request_id,
            rules=self._rules,
            attempt=attempt,
            now=self._clock(),
            revision_floor=(await read_bucket_epoch(self._store, self._clock)).revision_floor,
        )
        return _unchanged(previous) if following is None else await self._swap(stored, following)

    async def _read_again(self, task: IngestCity, manifest: Manifest) -> StreamedFile:
        if manifest.rule_version > rule_version():
            raise _NotReprocessable(
                f"its rules have version {manifest.rule_version}; this build has version {rule_version()}: upgrade"
            )
        chunks = self._store.stream(manifest.raw_key)
        download = Download(url=manifest.upstream_url, chunks=chunks, bytes_total=manifest.size_bytes)
        try:
            with metrics.time_stage("stream"):
                streamed = await self._stream(task, download, _DiscardingUpload())
        except ObjectNotFound as error:
            if not manifest.raw_expired:
                raise _NotReprocessable(f"its raw object {manifest.raw_key} is lost") from error
            raise _NotReprocessable(
                f"its raw object has expired: 'tripfold expire raw' deleted the files from before "
                f"{manifest.raw_expired_before:%Y-%m-%d}. Request {manifest.date} again to download the file"
            ) from error
        except FileRefused as refused:
            raise _NotReprocessable(f"the present rules refuse its stored file: {refused}") from refused
        if streamed.sha256 != manifest.sha256:
            raise _NotReprocessable(
                f"its raw object {manifest.raw_key} has changed since it was stored: run 'tripfold verify --deep'"
            )
        return streamed

    async def _take(
        self,
        download: Download,
        task: IngestCity,
        previous: Manifest | None,
        place: Place,
        attempt: str,
        *,
        raw_lost: bool,
    ) -> Manifest | CityResult | None:
        """Take steps 3 to 5 with a response. Return the next revision, the result, or None for an unchanged city."""
        if download.chunks is None:
            return await self._next(previous, task, place, None, attempt)
        raw_key = keys.raw(task.date, task.city_id, attempt)
        upload = self._store.upload(raw_key)
        try:
            with metrics.time_stage("stream"):
                streamed = await self._stream(task, download, upload)
            file = NewFile(
                raw_key=raw_key,
                url=download.url,
                validators=download.validators,
                streamed=streamed,
                replaces_lost=raw_lost,
            )
            manifest = await self._next(previous, task, place, file, attempt)
            if manifest is not None and manifest.raw_key == raw_key:
                manifest = await self._judged(manifest, streamed)
                with metrics.time_stage("complete_upload"):
                    await upload.complete()
        except FileRefused as refused:
            source = FileSource(url=download.url, validators=download.validators, attempt=attempt, raw_key=raw_key)
            report = await self._quarantine.keep(refused, task, source, upload)
            return CityResult(outcome=Outcome.FAILED, reason=report.reason, quarantine_key=report.key)
        else:
            return manifest
        finally:
            await upload.abort()

    async def _stream(self, task: IngestCity, download: Download, upload: Upload) -> StreamedFile:
        """Stream the file, and note meanwhile that it is being parsed. Raises FileRefused for an invalid file.

        Raises _MustBeIsolated if the file may have crashed another process.
        """
        assert download.chunks is not None, "an unchanged file is not streamed"
        if self._isolation is not None and not await self._attempts.begin(task.date, task.city_id):
            raise _MustBeIsolated
        refuse = self._crashes >= CRASHES_MAX
        async with self._reported(task, download) as progress:
            streamed = await stream_file(
                download.chunks,
                upload,
                date=task.date.isoformat(),
                rules=self._rules,
                progress=progress,
                threads=self._threads,
                parse=refuse_crashing_file(self._crashes) if refuse else total_trip_file,
            )
        metrics.bad_records.inc(streamed.totals.bad_records)
        return streamed

    async def _judged(self, manifest: Manifest, streamed: StreamedFile) -> Manifest:
        """Return the manifest with the judgement of its file's volume. Raises FileRefused if the rules refuse it."""
        suspicious = await self._volume_check.suspicion_of(manifest)
        if suspicious and self._volume_check.rules is not None and self._volume_check.rules.quarantined:
            fault = SuspiciousFile(f"the file has {suspicious}", bad_records=manifest.bad_records)
            raise FileRefused(fault, sha256=streamed.sha256, size_bytes=streamed.size_bytes, broke_off=None)
        return msgspec.structs.replace(manifest, suspicious=suspicious)

    async def _is_raw_lost(self, manifest: Manifest) -> bool:
        """Tell whether the raw object is missing although it has not expired."""
        return not manifest.raw_expired and await self._store.get(manifest.raw_key, first_bytes=0) is None

    async def _next(
        self, previous: Manifest | None, task: IngestCity, place: Place, file: NewFile | None, attempt: str
    ) -> Manifest | None:
        if previous is not None and is_unchanged(previous, task, place, file, self._rules):
            return None  # without a read of the epoch
        epoch = await read_bucket_epoch(self._store, self._clock)
        return next_manifest(
            previous,
            task,
            place,
            file,
            rules=self._rules,
            attempt=attempt,
            now=self._clock(),
            revision_floor=epoch.revision_floor,
        )

    async def _swap(self, stored: Versioned[Manifest] | None, manifest: Manifest | None) -> CityResult | None:
        assert manifest is not None
        manifest = msgspec.structs.replace(manifest, write_intent=UNSET)
        key = _key_of(manifest)
        try:
            with metrics.time_stage("write_manifest"):
                await self._repository.compare_and_swap(key, manifest, over=stored)
        except CasConflict:
            metrics.cas_conflicts.labels("manifest").inc()
            current = await self._repository.get(Manifest, key)
            # If the response to this attempt's write was lost, other workers may have built on that write.
            if current is None or not current.made_by(manifest.attempt):
                return None
            manifest = current
        else:
            if manifest.raw_key == keys.raw(manifest.date, manifest.city_id, manifest.attempt):  # a new file
                metrics.stored_bytes.inc(manifest.size_bytes)
                metrics.stored_trips.inc(manifest.contribution.trips)
                if manifest.suspicious:
                    metrics.suspicious_files.inc()
        if manifest.retracted and await self._place_after_move(manifest) is not None:
            return None
        return CityResult(outcome=Outcome.STORED, manifest=manifest)

    async def _place(self, task: IngestCity, previous: Manifest | None) -> Place:
        """Return the task's country, or the country of a newer plan if there is one."""
        asked = Place(country=task.country, country_name=task.country_name, plan_revision=task.plan_revision)
        if previous is None or previous.country == task.country:
            return asked
        if task.plan_revision < previous.plan_revision:
            return _place_of(previous)
        return await self._place_in_newer_plan(task, task.plan_revision) or asked

    async def _place_after_move(self, manifest: Manifest) -> Place | None:
        """Return the city's place if a plan newer than its last move names another country, or None.

        The newer plan's task may have run before the move was written, when the city still was in that country.
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
    async def _reported(self, task: IngestCity, download: Download) -> AsyncIterator[StreamProgress]:
        """Publish the progress of the stream once a second. Nothing depends on these events."""
        progress = StreamProgress()
        progress.bytes_total = download.bytes_total

        async def report() -> None:
            while True:
                await asyncio.sleep(PROGRESS_INTERVAL_S)
                progressed = CityProgressed(
                    request_id=task.request_id,
                    date=task.date,
                    city_id=task.city_id,
                    plan_revision=task.plan_revision,
                    position=task.position,
                    bytes_done=progress.bytes_done,
                    bytes_total=progress.bytes_total,
                    trips_done=progress.trips_done,
                )
                with contextlib.suppress(KafkaUnavailable):
                    await self._publisher.publish([OutgoingEvent(progressed)])

        # In a context of its own: thousands of these events would flood the trace of the request.
        reporting = asyncio.create_task(report(), context=contextvars.Context())
        try:
            yield progress
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)


def _made_for(manifest: Manifest, task: IngestCity) -> bool:
    """Tell whether the task's request made this revision, and the task does not move the city since."""
    settled = manifest.country == task.country or manifest.plan_revision >= task.plan_revision
    return manifest.request_id == task.request_id and settled


def _place_of(manifest: Manifest) -> Place:
    return Place(country=manifest.country, country_name=manifest.country_name, plan_revision=manifest.plan_revision)


class _DiscardingUpload:
    """An upload that discards its bytes, as they are already stored."""

    async def write(self, chunk: bytes) -> None:
        del chunk

    async def complete(self) -> None:
        return

    async def abort(self) -> None:
        return


def _unchanged(previous: Manifest) -> CityResult:
    return CityResult(outcome=Outcome.UNCHANGED, manifest=previous)


def _key_of(manifest: Manifest) -> str:
    return keys.manifest(manifest.date, manifest.city_id)
