"""Plans a requested date: reads the city list, writes the plan, and publishes one task for each city.

The order of effects:

0. decide whether to plan the request. Skip it if all its tasks were published, or if another request of its date runs.
   Publish ``RequestFailed`` if it was cancelled. Otherwise make it the running request of its date
   (``state/active-requests/``, compare-and-swap);
1. fetch the city list from the upstream, and mint a slug for each new country (``state/countries.json``,
   compare-and-swap). If the upstream fails or is down, publish the request again for a later attempt
   (`services.ingest.retries`), and go on at 8: no other request waits meanwhile;
2. write the plan (compare-and-swap, revision + 1). Keep a plan that this request made before, or that has the same
   content. Before a plan is replaced, write a write intent into it (compare-and-swap), and fetch the list again. A plan
   that is kept loses its intent, as a manifest does (`services.ingest.worker.city_day`);
3. publish ``CountryDayPlanned`` for each country of the plan, and an empty one for each country without cities;
4. publish ``RequestPlanned``;
5. publish the tasks;
6. read the plan again. If another planner has written a newer plan, publish the countries of that plan after ours;
7. mark the request as dispatched in its record (compare-and-swap);
8. commit.

After a crash at any step, Kafka redelivers the request, and the planner finds the plan that it wrote. A retry of
failed cities takes the same steps with the plan that it names, and publishes tasks for those cities only. A stalled
request that is published again takes them too, with tasks for its unfinished cities.

The planner of a request that reads stored files asks no upstream. It publishes a task for each city of the stored plan
and for each other city with a manifest, and no plan: it skips 1 to 3 and 6.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec
import structlog
from msgspec import UNSET
from structlog.contextvars import bound_contextvars

from services.ingest.planner.city_list import CityList, InvalidCityList, NoCities, parse_city_list
from services.ingest.planner.country_slugs import mint_slugs
from services.ingest.retries import next_attempt
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from services.ingest.upstream.port import Upstream
from services.ingest.upstream.retry import UpstreamRetryPolicy
from shared.domain import bitmap, keys
from shared.domain.contribution import COUNTRY_CITIES_MAX
from shared.domain.events import (
    Background,
    CountryDayPlanned,
    Event,
    IngestCity,
    ProcessRequested,
    RequestFailed,
    RequestPlanned,
    Source,
)
from shared.domain.ids import CountrySlug
from shared.domain.objects import (
    REMEDY,
    CorruptObject,
    Countries,
    Plan,
    PlannedCity,
    PlannedCountry,
    RequestRecord,
)
from shared.domain.outbox import events_of_plan
from shared.domain.requests import new_record, unfinished_of
from shared.domain.topics import Topic
from shared.kafka.consumer import DecodedRecord, decode_by_key, handle_keys
from shared.kafka.failed_keys import KeyResult
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent, process_span, traceparent_of
from shared.runtime import metrics
from shared.storage import active_requests
from shared.storage.bucket_epoch import next_revision, read_bucket_epoch
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository, read_cancelled_record, read_plan, read_request_record
from shared.storage.stored_cities import read_stored_cities

_log = structlog.get_logger()


class _RequestCancelled(Exception):  # no error: the planner publishes it as the request's end
    """The request was cancelled before it was planned."""


class _TryLater(Exception):  # no error: the request waits for its next attempt
    """The city list cannot be fetched now. ``request`` is the request for its next attempt."""

    def __init__(self, request: ProcessRequested) -> None:
        super().__init__()
        self.request = request


class Planner:
    """Plans the requests of ``process-requests``. Planners can run in parallel: compare-and-swap decides."""

    def __init__(
        self,
        store: ObjectStore,
        publisher: Publisher,
        upstream: Upstream,
        *,
        clock: Callable[[], dt.datetime],
        retry_policy: UpstreamRetryPolicy,
        allow_no_cities: bool = False,
    ) -> None:
        self._store = store
        self._repository = Repository(store)
        self._publisher = publisher
        self._upstream = upstream
        self._clock = clock
        self._retry_policy = retry_policy
        self._published: ProcessRequested | None = None  # published, but not yet marked in its record
        self._allow_no_cities = allow_no_cities

    async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        """Plan the requests of a batch: those of clients first, then the oldest. Afterwards it can be committed."""
        groups = await decode_by_key(batch, self._publisher, lambda event: _request_of(event).request_id)
        for events in groups.values():
            events.sort(key=lambda item: _order_of(_request_of(item.event)))
        in_order = sorted(groups, key=lambda request_id: _order_of(_request_of(groups[request_id][0].event)))
        return await handle_keys({request_id: groups[request_id] for request_id in in_order}, self._plan_in_turn)

    async def _plan_in_turn(self, events: Sequence[DecodedRecord]) -> None:
        """Plan a request, which Kafka may have delivered several times."""
        for item in events:
            request = _request_of(item.event)
            with bound_contextvars(request_id=request.request_id, date=str(request.date)):
                await self._read_and_plan(request, traceparent_of(dict(item.record.headers)))

    async def _read_and_plan(self, request: ProcessRequested, traceparent: str | None) -> None:
        if request == self._published:
            await self._mark_dispatched(request)
            return
        record = await read_request_record(self._store, request.request_id)
        if record is None and request.background:  # the progress must not write a record without this
            record = await self._repository.create_if_absent(
                keys.request(request.request_id),
                msgspec.structs.replace(
                    new_record(request.request_id, request.date, self._clock()), background=request.background
                ),
            )
        # Another request may have caused this record, as when that one ended: the record knows the request's own trace.
        traceparents = (record.traceparent if record else None, traceparent)
        with process_span(Topic.PROCESS_REQUESTS, traceparents, request_id=request.request_id, date=str(request.date)):
            await self._plan_request(request, record)

    async def _plan_request(self, request: ProcessRequested, record: RequestRecord | None) -> None:
        if record is not None and (_is_dispatched(record, request) or _is_over(record, request)):
            _log.info("request_already_planned")
            return
        background = record.background if record else UNSET
        stored = background if background and background.source is Source.BUCKET else None
        if not await self._may_begin(request, record):
            _log.info("request_waiting")
            return
        plan = await self._plan_or_end(request, record, stored)
        if plan is None:
            return
        cities = sum(len(planned.cities) for planned in plan.countries.values())
        planned = RequestPlanned(
            request_id=request.request_id,
            date=request.date,
            requested_at=request.requested_at,
            plan_revision=plan.revision,
            cities=cities,
            countries=len(plan.countries),
            bad_cities_count=plan.bad_cities_count,
            bad_cities=plan.bad_cities,
        )
        with metrics.time_stage("publish_plan"):
            if not stored:
                await self._publish_countries(plan)
            await self._publisher.publish([OutgoingEvent(planned)])
            await self._publisher.publish(
                OutgoingEvent(task, topic=task.runs_from) for task in _tasks(plan, request, record)
            )
        _log.info("request_planned", cities=cities, countries=len(plan.countries), plan_revision=plan.revision)
        # This planner may have published its countries after those of a newer plan. The newest must come last.
        latest = None if stored else await read_plan(self._store, request.date)
        while latest is not None and latest.revision > plan.revision:
            plan = latest
            await self._publish_countries(plan)
            latest = await read_plan(self._store, request.date)
        self._published = request
        await self._mark_dispatched(request)

    async def _plan_or_end(
        self, request: ProcessRequested, record: RequestRecord | None, stored: Background | None
    ) -> Plan | None:
        """Return the plan of a request; or None after the request has failed, was cancelled, or waits for a retry."""
        try:
            if stored:
                return await self._stored_cities(request, stored)
            return await self._plan_of(request, record)
        except _RequestCancelled:
            _log.info("request_cancelled")
            await self._publish_failed(request, record, "the request was cancelled before its cities were planned")
        except _TryLater as later:
            _log.info("request_retry_scheduled", error=str(later.__cause__))
            await self._publisher.publish([OutgoingEvent(later.request, topic=Topic.RETRIES)])
        except CorruptObject as error:
            if not error.harms_alone:
                raise  # the batch waits
            _log.error("object_unreadable", key=error.key, error=str(error))
            await self._publish_failed(request, record, f"{error}. {REMEDY}")
            await self._mark_dispatched(request)
        except (PermanentUpstreamError, InvalidCityList) as error:
            _log.warning("request_failed", error=str(error))
            listed = error.listed if isinstance(error, NoCities) else None
            await self._publish_failed(request, record, f"the list of cities cannot be used: {error}", listed)
            await self._mark_dispatched(request)
        return None

    async def _may_begin(self, request: ProcessRequested, record: RequestRecord | None) -> bool:
        """Make the request the running one of its date. Return False if it has to wait for another request."""
        if request.retry is not None or (record is not None and record.cancelled_at is not None):
            return True
        background = record is not None and record.background is not UNSET
        return await active_requests.begin(
            self._store, request.date, request.request_id, self._clock(), background=background
        )

    async def _mark_dispatched(self, request: ProcessRequested) -> None:
        async def mark(before: RequestRecord | None) -> RequestRecord:
            record = before or new_record(request.request_id, request.date, self._clock())
            if _is_dispatched(record, request):
                return record
            return msgspec.structs.replace(record, dispatched_at=_asked_at(request))

        await self._repository.update(RequestRecord, keys.request(request.request_id), mark, counted_as="request")

    async def _publish_failed(
        self, request: ProcessRequested, record: RequestRecord | None, reason: str, listed: CityList | None = None
    ) -> None:
        failed = RequestFailed(
            request_id=request.request_id,
            date=request.date,
            requested_at=request.requested_at,
            reason=reason[:2_000],
            retried_at=_retried_at(request, record),
            bad_cities_count=listed.bad_cities_count if listed else 0,
            bad_cities=listed.bad_cities if listed else (),
        )
        await self._publisher.publish([OutgoingEvent(failed)])

    async def _publish_countries(self, plan: Plan) -> None:
        events: list[CountryDayPlanned] = []
        for country in sorted({*plan.countries, *plan.gone}):
            events += events_of_plan(plan, country)
        await self._publisher.publish(map(OutgoingEvent, events))

    async def _stored_cities(self, request: ProcessRequested, wanted: Background) -> Plan:
        await self._raise_if_cancelled(request)
        plan = await read_plan(self._store, request.date)
        countries = await read_stored_cities(self._store, request.date, wanted, plan)
        if plan is None:
            plan = Plan(
                date=request.date, revision=1, request_id=request.request_id, planned_at=self._clock(), countries={}
            )
        return msgspec.structs.replace(plan, countries=countries, gone={}, bad_cities_count=0, bad_cities=())

    async def _plan_of(self, request: ProcessRequested, record: RequestRecord | None) -> Plan:
        key = keys.plan(request.date)
        while True:
            stored = await self._repository.read(Plan, key)
            before = stored.value if stored else None
            if before is not None and _made_for(before, request, record):
                return before
            after = await self._next_plan(before, request)
            if stored is not None and after is before:
                present = await self._store.get(key, first_bytes=0)
                if present is not None and present.etag == stored.etag:
                    return after
                continue
            try:
                await self._repository.compare_and_swap(key, after, over=stored)
            except CasConflict:
                metrics.cas_conflicts.labels("plan").inc()
                continue
            if after.write_intent is UNSET:
                return after

    async def _next_plan(self, before: Plan | None, request: ProcessRequested) -> Plan:
        """Return the plan of the present list of cities, or ``before`` itself if its content is the same.

        If the content differs and ``before`` has no write intent, return ``before`` with one. The list is then fetched
        again, as it may have changed before the intent was written.
        """
        await self._raise_if_cancelled(request)
        with metrics.time_stage("city_list"):
            body = await self._fetch_list(request)
            # A list can hold 100,000 cities. Threads keep the event loop free for heartbeats and streams.
            listed = await asyncio.to_thread(parse_city_list, body)
        if not listed.cities and not self._allow_no_cities:
            raise NoCities(listed)
        slugs = (await self._mint_slugs(listed)).slugs
        epoch = await read_bucket_epoch(self._store, self._clock)
        plan = await asyncio.to_thread(
            next_plan, before, request, listed, slugs, now=self._clock(), revision_floor=epoch.revision_floor
        )
        if before is None:
            return plan
        if _has_same_content(before, plan):
            return before if before.write_intent is UNSET else msgspec.structs.replace(before, write_intent=UNSET)
        return msgspec.structs.replace(before, write_intent=uuid.uuid4().hex) if before.write_intent is UNSET else plan

    async def _fetch_list(self, request: ProcessRequested) -> bytes:
        """Fetch the city list once. Raises _TryLater, or PermanentUpstreamError after the last attempt."""
        began_at = self._clock()
        try:
            return await self._retry_policy.run_at_once(self._upstream.cities)
        except (TransientUpstreamError, UpstreamDown) as fault:
            later = next_attempt(
                request,
                fault,
                began_at=began_at,
                now=self._clock(),
                attempts_max=self._retry_policy.attempts_max,
                outage_limit_s=self._retry_policy.outage_limit_s,
            )
            raise _TryLater(later) from fault

    async def _raise_if_cancelled(self, request: ProcessRequested) -> None:
        record = await read_cancelled_record(self._store, request.request_id)
        # A planned request ends city by city: the planner publishes its tasks again, and the workers skip them.
        if record is not None and not record.planned:
            raise _RequestCancelled

    async def _mint_slugs(self, listed: CityList) -> Countries:
        async def mint(before: Countries | None) -> Countries | None:
            known = before or Countries()
            minted = await asyncio.to_thread(mint_slugs, known, {city.country_name for city in listed.cities})
            return before if minted is known else minted

        return await self._repository.update(Countries, keys.COUNTRIES, mint, counted_as="countries") or Countries()


def next_plan(
    before: Plan | None,
    request: ProcessRequested,
    listed: CityList,
    slugs: dict[str, CountrySlug],
    *,
    now: dt.datetime,
    revision_floor: int,
) -> Plan:
    """Return the plan after ``before``: the listed cities by country, and the countries that have no cities now."""
    cities: dict[CountrySlug, list[PlannedCity]] = {}
    spellings: dict[CountrySlug, Counter[str]] = {}
    for entry in listed.cities:
        country = slugs[entry.country_name]
        spellings.setdefault(country, Counter())[entry.country_name] += 1
        cities.setdefault(country, []).append(entry.city)
        if len(cities[country]) > COUNTRY_CITIES_MAX:
            raise InvalidCityList(f"{entry.country_name} has more than {COUNTRY_CITIES_MAX:,} cities")
    # The most frequent spelling becomes the name, independent of the order of the list.
    names = {country: max(sorted(found), key=found.__getitem__) for country, found in spellings.items()}
    countries = {
        country: PlannedCountry(
            name=names[country], cities=tuple(sorted(cities[country], key=lambda city: city.city_id))
        )
        for country in sorted(cities)
    }
    gone: dict[CountrySlug, str] = {}
    if before is not None:
        gone = before.gone | {country: planned.name for country, planned in before.countries.items()}
    return Plan(
        date=request.date,
        revision=next_revision(before.revision if before else None, revision_floor),
        request_id=request.request_id,
        planned_at=now,
        countries=countries,
        gone={country: name for country, name in sorted(gone.items()) if country not in countries},
        bad_cities_count=listed.bad_cities_count,
        bad_cities=listed.bad_cities,
    )


def _has_same_content(before: Plan, plan: Plan) -> bool:
    """Tell whether two plans differ in their revision only. If so, the earlier one stays and no summary changes."""
    return (before.countries, before.gone, before.bad_cities, before.bad_cities_count) == (
        plan.countries,
        plan.gone,
        plan.bad_cities,
        plan.bad_cities_count,
    )


def _made_for(plan: Plan, request: ProcessRequested, record: RequestRecord | None) -> bool:
    """Tell whether the request made this plan, or repeats cities of it."""
    retry = request.retry
    return (
        plan.request_id == request.request_id
        or (retry is not None and retry.plan_revision == plan.revision)
        or _is_resent_under(plan, request, record)
    )


def _is_resent_under(plan: Plan, request: ProcessRequested, record: RequestRecord | None) -> bool:
    """Tell whether this is a stalled request, published again, whose record names this plan."""
    return (
        request.resent_at is not None
        and record is not None
        and record.planned
        and record.plan_revision == plan.revision
    )


def _retried_at(request: ProcessRequested, record: RequestRecord | None) -> dt.datetime | None:
    """Return the time of the latest retry of a request. A failure from before that time does not end it."""
    retries = (request.retry, record.retry if record is not None else None)
    return max((retry.retried_at for retry in retries if retry is not None), default=None)


def _request_of(event: Event) -> ProcessRequested:
    assert isinstance(event, ProcessRequested), "the topic has no other events"
    return event


def _order_of(request: ProcessRequested) -> tuple[bool, dt.datetime, dt.date]:
    return (request.background is not UNSET, _asked_at(request), request.date)


def _asked_at(request: ProcessRequested) -> dt.datetime:
    """Return when this event was published: as a request, later as a retry, or later still as a repetition."""
    retried_at = request.retry.retried_at if request.retry else request.requested_at
    return max(retried_at, request.resent_at or retried_at)


def _is_over(record: RequestRecord, request: ProcessRequested) -> bool:
    """Tell whether the request has failed since this event, or runs again by a later retry, which has an own event.

    An event can come so late if the request was published again while it waited for its next attempt.
    """
    return record.failed_reason is not None or (
        record.retry is not None and _asked_at(request) < record.retry.retried_at
    )


def _is_dispatched(record: RequestRecord, request: ProcessRequested) -> bool:
    """Tell whether all tasks of this request, retry or repetition were published."""
    if record.dispatched_at is None:
        return False
    repeated = request.retry is not None or request.resent_at is not None
    return not repeated or _asked_at(request) <= record.dispatched_at


def _tasks(plan: Plan, request: ProcessRequested, record: RequestRecord | None) -> Iterator[IngestCity]:
    """Yield a task for each requested city. A retry whose plan was replaced gets a task for every city."""
    retry = request.retry
    chosen = bitmap.decode(retry.positions) if retry and retry.plan_revision == plan.revision else None
    if record is not None and _is_resent_under(plan, request, record):
        chosen = unfinished_of(record)
    background = record.background if record else UNSET
    position = 0
    for country, planned in plan.countries.items():
        for city in planned.cities:
            if chosen is None or bitmap.contains(chosen, position):
                yield IngestCity(
                    request_id=request.request_id,
                    date=plan.date,
                    city_id=city.city_id,
                    upstream_id=city.upstream_id,
                    city_name=city.name,
                    country=country,
                    country_name=planned.name,
                    plan_revision=plan.revision,
                    position=position,
                    retried_at=_retried_at(request, record),
                    background=msgspec.structs.replace(background, country=None, city_id=None) if background else UNSET,
                )
            position += 1
