"""Planning a requested date: which cities it expects, and one task for each.

The order of effects:

0. nothing for a request whose tasks were all published, nor for one that waits while another of its date runs; for
   one that was cancelled, the word that it was; any other becomes the one that runs (``state/active-requests/``,
   compare-and-swap);
1. the list of cities from the upstream, and a slug for each country (``state/countries.json``, compare-and-swap);
2. the plan (compare-and-swap, revision + 1); one that this request already made, or that expects the same, stays;
3. ``CountryDayPlanned`` for each country of the plan, and an empty one for each that has no city left;
4. ``RequestPlanned``;
5. the tasks;
6. the plan again: if it moved on meanwhile, the newer one's countries are published after ours;
7. into the request's record, that its tasks were published (compare-and-swap);
8. commit.

A crash after any step leaves a request that comes again, and finds its own plan. A retry of failed cities goes the
same way: under the plan that it names, with tasks for its cities alone. So does a stalled request that is published
again, with tasks for its unfinished cities.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec
import structlog

from services.ingest.cancellation import CANCELLED, RequestCancelled, read_cancelled, read_record
from services.ingest.planner.city_list import CityList, InvalidCityList, mint_slugs, parse_city_list
from services.ingest.upstream.client import PermanentUpstreamError, Upstream, UpstreamRetryPolicy
from shared.domain import bitmap, keys, objects
from shared.domain.events import CountryDayPlanned, IngestCity, ProcessRequested, RequestFailed, RequestPlanned
from shared.domain.ids import CountrySlug
from shared.domain.objects import Countries, Plan, PlannedCity, PlannedCountry, RequestRecord
from shared.domain.outbox import events_of_plan
from shared.domain.requests import new_record, unfinished_of
from shared.kafka.consumer import decode_batch
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent
from shared.runtime import metrics
from shared.storage import active_requests
from shared.storage.bucket_epoch import next_revision, read_bucket_epoch
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository

_log = structlog.get_logger()


class Planner:
    """Plans the requests of ``process-requests``. Any number can run side by side: the plan's swap decides."""

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
        self._persistence = retry_policy
        self._published: ProcessRequested | None = None  # what an outage kept from being noted in its record
        self._allow_no_cities = allow_no_cities

    async def process(self, batch: Sequence[ConsumedRecord]) -> None:
        """Plan the requests of a batch, the oldest first; those of a range by date. Then it can be committed."""
        decoded = [item.event for item in await decode_batch(batch, self._publisher)]
        requests = [event for event in decoded if isinstance(event, ProcessRequested)]
        for request in sorted(requests, key=lambda request: (_moment(request), request.date)):
            await self._plan_request(request)

    async def _plan_request(self, request: ProcessRequested) -> None:
        log = _log.bind(request_id=request.request_id, date=str(request.date))
        if request == self._published:
            await self._mark_dispatched(request)
            return
        record = await read_record(self._store, request.request_id)
        if record is not None and _is_dispatched(record, request):
            log.info("request planned already")
            return
        if not await self._may_begin(request, record):
            log.info("request waits for the one of its date that runs")
            return
        try:
            plan = await self._plan_of(request, record)
        except RequestCancelled as cancelled:
            log.info("request cancelled")
            await self._publish_failed(request, record, f"{cancelled} before its cities were planned")
            return
        except (PermanentUpstreamError, InvalidCityList) as error:
            log.warning("request failed", reason=str(error))
            await self._publish_failed(request, record, f"the list of cities could not be had: {error}")
            await self._mark_dispatched(request)
            return
        await self._publish_countries(plan)
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
        await self._publisher.publish([OutgoingEvent(planned)])
        await self._publisher.publish(map(OutgoingEvent, _tasks(plan, request, record)))
        log.info("planned", cities=cities, countries=len(plan.countries), plan_revision=plan.revision)
        # Our countries may have been published after those of a newer plan: the topic is to end in the newest.
        latest = await read_plan(self._store, request.date)
        while latest is not None and latest.revision > plan.revision:
            plan = latest
            await self._publish_countries(plan)
            latest = await read_plan(self._store, request.date)
        self._published = request
        await self._mark_dispatched(request)

    async def _may_begin(self, request: ProcessRequested, record: RequestRecord | None) -> bool:
        """Make the request the one of its date that runs, unless it has to wait for its turn."""
        if request.retry is not None or (record is not None and record.cancelled_at is not None):
            return True
        return await active_requests.begin(self._store, request.date, request.request_id, self._clock())

    async def _mark_dispatched(self, request: ProcessRequested) -> None:
        key = keys.request(request.request_id)
        while True:
            found = await self._store.get(key)
            if found is None:
                record = new_record(request.request_id, request.date, self._clock())
            else:
                record = objects.decode(RequestRecord, found.body, key)
            if _is_dispatched(record, request):
                return
            marked = msgspec.structs.replace(record, dispatched_at=_moment(request))
            try:
                await self._store.compare_and_swap(key, objects.encode(marked), etag=found.etag if found else None)
            except CasConflict:
                metrics.cas_conflicts.labels("request").inc()
                continue
            return

    async def _publish_failed(self, request: ProcessRequested, record: RequestRecord | None, reason: str) -> None:
        failed = RequestFailed(
            request_id=request.request_id,
            date=request.date,
            requested_at=request.requested_at,
            reason=reason[:2_000],
            retried_at=_retried_at(request, record),
        )
        await self._publisher.publish([OutgoingEvent(failed)])

    async def _publish_countries(self, plan: Plan) -> None:
        events: list[CountryDayPlanned] = []
        for country in sorted({*plan.countries, *plan.gone}):
            events += events_of_plan(plan, country)
        await self._publisher.publish(map(OutgoingEvent, events))

    async def _plan_of(self, request: ProcessRequested, record: RequestRecord | None) -> Plan:
        key = keys.plan(request.date)
        epoch = await read_bucket_epoch(self._store, self._clock)

        # The plan is read before the list is fetched: so a list never replaces a plan made from a later one.
        async def replan(before: Plan | None) -> Plan:
            if before is not None and _made_for(before, request, record):
                return before
            await self._refuse_cancelled(request)
            body = await self._persistence.fetch(self._upstream.cities)
            # A list may hold 100,000 cities: threads keep the event loop free for heartbeats and streams.
            listed = await asyncio.to_thread(parse_city_list, body)
            if not listed.cities and not self._allow_no_cities:
                raise InvalidCityList(_no_cities(listed))
            slugs = (await self._mint(listed)).slugs
            plan = await asyncio.to_thread(
                next_plan, before, request, listed, slugs, now=self._clock(), base=epoch.base
            )
            return before if before is not None and _expects_the_same(before, plan) else plan

        plan = await self._repository.update(Plan, key, replan, counted_as="plan")
        assert plan is not None, "a missing one is made"
        return plan

    async def _refuse_cancelled(self, request: ProcessRequested) -> None:
        record = await read_cancelled(self._store, request.request_id)
        # One whose cities are known ends city by city: its tasks are published again, for the workers to skip.
        if record is not None and not record.planned:
            raise RequestCancelled(CANCELLED)

    async def _mint(self, listed: CityList) -> Countries:
        async def mint(before: Countries | None) -> Countries | None:
            known = before or Countries()
            minted = await asyncio.to_thread(mint_slugs, known, {city.country_name for city in listed.cities})
            return before if minted is known else minted

        return await self._repository.update(Countries, keys.COUNTRIES, mint, counted_as="countries") or Countries()


def _no_cities(listed: CityList) -> str:
    found = "it is empty"
    if listed.bad_cities_count:
        first = listed.bad_cities[0]
        found = f"none of its {listed.bad_cities_count} entries is a city; the first is {first.entry}: {first.reason}"
    return f"{found}; set TRIPFOLD_UPSTREAM_ALLOW_EMPTY_CITY_LIST=true if a date may have no cities"


def next_plan(
    before: Plan | None,
    request: ProcessRequested,
    listed: CityList,
    slugs: dict[str, CountrySlug],
    *,
    now: dt.datetime,
    base: int,
) -> Plan:
    """Return the plan that follows ``before``: the listed cities by country, and the countries that have none left."""
    cities: dict[CountrySlug, list[PlannedCity]] = {}
    spellings: dict[CountrySlug, Counter[str]] = {}
    for entry in listed.cities:
        country = slugs[entry.country_name]
        spellings.setdefault(country, Counter())[entry.country_name] += 1
        cities.setdefault(country, []).append(entry.city)
    # Of several spellings the most frequent is shown, whatever the order of the list.
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
        revision=next_revision(before.revision if before else None, base),
        request_id=request.request_id,
        planned_at=now,
        countries=countries,
        gone={country: name for country, name in sorted(gone.items()) if country not in countries},
        bad_cities_count=listed.bad_cities_count,
        bad_cities=listed.bad_cities,
    )


def _expects_the_same(before: Plan, plan: Plan) -> bool:
    """Tell whether a plan says nothing new: then the one before stays, and no summary changes for its sake."""
    return (before.countries, before.gone, before.bad_cities, before.bad_cities_count) == (
        plan.countries,
        plan.gone,
        plan.bad_cities,
        plan.bad_cities_count,
    )


def _made_for(plan: Plan, request: ProcessRequested, record: RequestRecord | None) -> bool:
    """Tell whether a request has its plan: it made it, or asks for cities of it once more."""
    retry = request.retry
    return (
        plan.request_id == request.request_id
        or (retry is not None and retry.plan_revision == plan.revision)
        or _is_resent_under(plan, request, record)
    )


def _is_resent_under(plan: Plan, request: ProcessRequested, record: RequestRecord | None) -> bool:
    """Tell whether a stalled request was published again whose record goes by this plan."""
    return (
        request.resent_at is not None
        and record is not None
        and record.planned
        and record.plan_revision == plan.revision
    )


def _retried_at(request: ProcessRequested, record: RequestRecord | None) -> dt.datetime | None:
    """Return the time of the latest retry of a request: an earlier failure does not end it."""
    retries = (request.retry, record.retry if record is not None else None)
    return max((retry.retried_at for retry in retries if retry is not None), default=None)


def _moment(request: ProcessRequested) -> dt.datetime:
    """Return when the processing was asked for: of a request, a retry and its repetition each is later."""
    retried_at = request.retry.retried_at if request.retry else request.requested_at
    return max(retried_at, request.resent_at or retried_at)


def _is_dispatched(record: RequestRecord, request: ProcessRequested) -> bool:
    """Tell whether every task of a request, or of this retry or repetition of it, was published."""
    if record.dispatched_at is None:
        return False
    repeated = request.retry is not None or request.resent_at is not None
    return not repeated or _moment(request) <= record.dispatched_at


async def read_plan(store: ObjectStore, date: dt.date) -> Plan | None:
    """Read the plan of a date, or None if it was never requested."""
    return await Repository(store).get(Plan, keys.plan(date))


def _tasks(plan: Plan, request: ProcessRequested, record: RequestRecord | None) -> Iterator[IngestCity]:
    """Yield a task for each city that is asked for: of a plan that has moved on since the retry, for all of them."""
    retry = request.retry
    chosen = bitmap.decode(retry.positions) if retry and retry.plan_revision == plan.revision else None
    if record is not None and _is_resent_under(plan, request, record):
        chosen = unfinished_of(record)
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
                )
            position += 1
