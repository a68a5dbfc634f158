"""How progress events become the record of a request. Pure: the time is passed in.

Like the fold of summaries it is a join: of two plans the higher revision counts and begins anew, of two outcomes of
a city the higher one (failed < skipped < unchanged < stored), of published and folded revisions the highest for each
country. Events may come twice and in any order; display figures (bytes, trips) are taken from the best outcome.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

import msgspec

from shared import bitmap
from shared.events import CityFinished, CityFolded, CityProgressed, Event, Outcome, RequestFailed, RequestPlanned
from shared.identity import CountrySlug, RequestId, request_time_ms
from shared.objects import CityUnderWay, Failure, RequestRecord

FAILURES_MAX = 100

ProgressEvent = RequestPlanned | CityProgressed | CityFinished | CityFolded | RequestFailed
_CityEvent = CityProgressed | CityFinished | CityFolded


def new_record(request_id: RequestId, date: dt.date, now: dt.datetime) -> RequestRecord:
    """Return the record of a request that nothing else is known of; when it was made is in its id."""
    requested_at = dt.datetime.fromtimestamp(request_time_ms(request_id) / 1000, dt.UTC)
    return RequestRecord(request_id=request_id, date=date, requested_at=requested_at, updated_at=now)


def fold_progress(record: RequestRecord, folded: Iterable[ProgressEvent], now: dt.datetime) -> RequestRecord:
    """Fold events of one request into its record. Returns ``record`` itself if they change nothing."""
    result = record
    for event in folded:
        match event:
            case RequestPlanned():
                result = _plan(result, event)
            case RequestFailed():
                result = result if result.failed_reason else msgspec.structs.replace(result, failed_reason=event.reason)
            case _:
                result = _city(result, event)
    if result == record:
        return record
    return msgspec.structs.replace(result, version=record.version + 1, updated_at=now)


def is_progress_event(event: Event) -> ProgressEvent:
    """Return ``event`` as one of a request's progress; its topic holds no other types."""
    assert isinstance(event, ProgressEvent)
    return event


def _plan(record: RequestRecord, event: RequestPlanned) -> RequestRecord:
    if event.plan_revision < record.plan_revision or (record.planned and event.plan_revision == record.plan_revision):
        return record
    return msgspec.structs.replace(
        _at_plan(record, event.plan_revision),
        planned=True,
        failed_reason=None,
        requested_at=event.requested_at,
        cities=event.cities,
        countries=event.countries,
        bad_cities_count=event.bad_cities_count,
        bad_cities=event.bad_cities,
    )


def _at_plan(record: RequestRecord, plan_revision: int) -> RequestRecord:
    """Begin anew under a higher plan: positions mean other cities there."""
    if plan_revision == record.plan_revision:
        return record
    return RequestRecord(
        request_id=record.request_id,
        date=record.date,
        requested_at=record.requested_at,
        updated_at=record.updated_at,
        version=record.version,
        resent_at=record.resent_at,
        plan_revision=plan_revision,
    )


def _city(record: RequestRecord, event: _CityEvent) -> RequestRecord:
    if event.plan_revision < record.plan_revision:
        return record
    record = _at_plan(record, event.plan_revision)
    if bitmap.contains(record.served, event.position):
        return record
    city = record.under_way.get(event.position, CityUnderWay())
    match event:
        case CityProgressed():
            if _outcome_of(record, event.position) is not None:
                return record
            city = msgspec.structs.replace(
                city,
                bytes_done=max(city.bytes_done, event.bytes_done),
                bytes_total=event.bytes_total,
                trips_done=max(city.trips_done, event.trips_done),
            )
        case CityFolded():
            city = msgspec.structs.replace(city, folded=_highest(city.folded, ((event.country, event.revision),)))
        case CityFinished():
            record = _with_outcome(record, event)
            pairs = tuple((pair.country, pair.revision) for pair in event.published)
            city = msgspec.structs.replace(
                city,
                bytes_done=max(city.bytes_done, event.size_bytes),
                bytes_total=max(city.bytes_done, event.size_bytes),
                trips_done=max(city.trips_done, event.trips),
                published=_highest(city.published, pairs),
            )
    return _settle(record, event.position, city)


def _settle(record: RequestRecord, position: int, city: CityUnderWay) -> RequestRecord:
    """Put a city back, or count it as served, or as failed, once it is."""
    outcome = _outcome_of(record, position)
    others = {place: other for place, other in record.under_way.items() if place != position}
    ended = outcome in {Outcome.UNCHANGED, Outcome.STORED}
    served = ended and all(city.folded.get(country, 0) >= revision for country, revision in city.published.items())
    if served:
        return msgspec.structs.replace(
            record,
            under_way=others,
            served=bitmap.with_member(record.served, position),
            bytes_done=record.bytes_done + city.bytes_done,
            trips_done=record.trips_done + city.trips_done,
        )
    if outcome in {Outcome.FAILED, Outcome.SKIPPED} and not city.folded:
        return msgspec.structs.replace(record, under_way=others)
    return msgspec.structs.replace(record, under_way=dict(sorted((others | {position: city}).items())))


def _outcome_of(record: RequestRecord, position: int) -> Outcome | None:
    for outcome, members in record.outcomes.items():
        if bitmap.contains(members, position):
            return outcome
    return None


def _with_outcome(record: RequestRecord, event: CityFinished) -> RequestRecord:
    known = _outcome_of(record, event.position)
    if known is not None and known.rank >= event.outcome.rank:
        return record
    outcomes = dict(record.outcomes)
    if known is not None:
        outcomes[known] = bitmap.without_member(outcomes[known], event.position)
    outcomes[event.outcome] = bitmap.with_member(outcomes.get(event.outcome, "0"), event.position)
    failures = {place: failure for place, failure in record.failures.items() if place != event.position}
    if event.outcome is Outcome.FAILED and len(failures) < FAILURES_MAX:
        failures[event.position] = Failure(
            city_id=event.city_id, city_name=event.city_name, reason=event.reason or "no reason was given"
        )
    return msgspec.structs.replace(
        record,
        outcomes={outcome: outcomes[outcome] for outcome in Outcome if outcome in outcomes},
        failures=dict(sorted(failures.items())),
    )


def _highest(known: dict[CountrySlug, int], pairs: Iterable[tuple[CountrySlug, int]]) -> dict[CountrySlug, int]:
    result = dict(known)
    for country, revision in pairs:
        result[country] = max(revision, result.get(country, 0))
    return dict(sorted(result.items()))
