"""Folds progress events into the record of a request. Pure: the time is passed in.

The fold is a join, so events may come twice and in any order:

- The plan with the higher revision counts, and the record begins anew under it.
- The higher of two outcomes of a city counts (failed < skipped < unchanged < stored).
- The failure of a city in the later retry counts.
- The highest published revision of each country counts, and the highest folded one.

The record shows the bytes and trips of the first end that was served. While a retry runs, only its own failures count:
a late failure of an earlier run does not end it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

import msgspec

from shared.domain import bitmap
from shared.domain.events import CityFinished, CityFolded, CityProgressed, Event, Outcome, RequestFailed, RequestPlanned
from shared.domain.ids import EXACT_MAX, CountrySlug
from shared.domain.objects import CityUnderWay, Failure, RequestRecord

FAILURES_MAX = 100

ProgressEvent = RequestPlanned | CityProgressed | CityFinished | CityFolded | RequestFailed
_CityEvent = CityProgressed | CityFinished | CityFolded


def fold_progress(record: RequestRecord, folded: Iterable[ProgressEvent], now: dt.datetime) -> RequestRecord:
    """Fold events of one request into its record. Returns ``record`` itself if they change nothing."""
    working = _RecordBuilder(record)
    for event in folded:
        if isinstance(event, RequestFailed):
            working.fail(event)
            continue
        if event.plan_revision > working.plan_revision:
            working = _RecordBuilder(_begun_anew(working.record(), event.plan_revision))
        if event.plan_revision < working.plan_revision:
            continue
        if isinstance(event, RequestPlanned):
            working.plan(event)
        else:
            working.city(event)
    result = working.record()
    if result == record:
        return record
    return msgspec.structs.replace(result, version=record.version + 1, updated_at=now)


def as_progress_event(event: Event) -> ProgressEvent:
    """Return ``event`` as a type of request progress; its topic holds no other types."""
    assert isinstance(event, ProgressEvent)
    return event


def _begun_anew(record: RequestRecord, plan_revision: int) -> RequestRecord:
    """Return the record without any progress, under a higher plan in which positions mean other cities."""
    failed = record.failed_reason is not None
    return msgspec.structs.replace(
        record,
        plan_revision=plan_revision,
        planned=False,
        cities=0,
        countries=0,
        bad_cities_count=record.bad_cities_count if failed else 0,
        bad_cities=record.bad_cities if failed else (),
        outcomes={},
        served="0",
        under_way={},
        bytes_done=0,
        trips_done=0,
        failures={},
    )


class _RecordBuilder:
    """A record during the fold: bitmaps are integers and maps are dictionaries, encoded once at the end."""

    def __init__(self, record: RequestRecord) -> None:
        self._fixed = record
        self._outcomes = {outcome: bitmap.decode(record.outcomes.get(outcome, "0")) for outcome in Outcome}
        self._served = bitmap.decode(record.served)
        self._under_way = dict(record.under_way)
        self._failures = dict(record.failures)
        self._bytes_done = record.bytes_done
        self._trips_done = record.trips_done

    @property
    def plan_revision(self) -> int:
        """The revision of the plan that positions belong to; 0 before a plan is known."""
        return self._fixed.plan_revision

    def record(self) -> RequestRecord:
        """Return the changed record."""
        return msgspec.structs.replace(
            self._fixed,
            outcomes={outcome: bitmap.encode(members) for outcome, members in self._outcomes.items() if members},
            served=bitmap.encode(self._served),
            under_way=dict(sorted(self._under_way.items())),
            failures=dict(sorted(self._failures.items())[:FAILURES_MAX]),
            bytes_done=self._bytes_done,
            trips_done=self._trips_done,
        )

    def fail(self, event: RequestFailed) -> None:
        """Record that the whole request cannot be served. A plan that comes later outweighs this."""
        if self._fixed.failed_reason is None and not self._fixed.planned and not self._is_before_retry(event):
            self._fixed = msgspec.structs.replace(
                self._fixed,
                failed_reason=event.reason,
                bad_cities_count=event.bad_cities_count,
                bad_cities=event.bad_cities,
            )

    def plan(self, event: RequestPlanned) -> None:
        """Record the counts of the plan, if no plan is known yet."""
        if self._fixed.planned:
            return
        self._fixed = msgspec.structs.replace(
            self._fixed,
            planned=True,
            failed_reason=None,
            requested_at=event.requested_at,
            cities=event.cities,
            countries=event.countries,
            bad_cities_count=event.bad_cities_count,
            bad_cities=event.bad_cities,
        )

    def city(self, event: _CityEvent) -> None:
        """Fold an event of one city."""
        position = event.position
        if isinstance(event, CityFinished):
            failed = event.outcome in {Outcome.FAILED, Outcome.SKIPPED}
            if failed and self._is_retried(position) and self._is_before_retry(event):
                return
            self._note_outcome(event)
        if bitmap.contains(self._served, position):
            return
        outcome = self._outcome_of(position)
        known = self._under_way.get(position, CityUnderWay())
        match event:
            case CityProgressed():
                city = known if outcome else _progressed(known, event)
            case CityFolded():
                folded = _highest(known.folded, ((event.country, event.revision),))
                city = msgspec.structs.replace(known, folded=folded)
            case CityFinished():
                city = _finished(known, event)
        self._settle(position, self._outcome_of(position), city)

    def _is_retried(self, position: int) -> bool:
        retry = self._fixed.retry
        if retry is None:
            return False
        return retry.plan_revision != self.plan_revision or bitmap.contains(bitmap.decode(retry.positions), position)

    def _is_before_retry(self, event: CityFinished | RequestFailed) -> bool:
        retry = self._fixed.retry
        return retry is not None and (event.retried_at is None or event.retried_at < retry.retried_at)

    def _outcome_of(self, position: int) -> Outcome | None:
        return next((one for one, members in self._outcomes.items() if bitmap.contains(members, position)), None)

    def _note_outcome(self, event: CityFinished) -> None:
        known = self._outcome_of(event.position)
        if known is Outcome.FAILED is event.outcome:
            self._note_failure(event)
        if known is not None and known.rank >= event.outcome.rank:
            return
        member = bitmap.member(event.position)
        if known is not None:
            self._outcomes[known] &= ~member
        self._outcomes[event.outcome] |= member
        self._failures.pop(event.position, None)
        if event.outcome is Outcome.FAILED:
            self._note_failure(event)

    def _note_failure(self, event: CityFinished) -> None:
        """Keep the reason of the latest retry; of equally late reasons, the greater text."""
        failure = Failure(
            city_id=event.city_id,
            city_name=event.city_name,
            reason=event.reason or "no reason was given",
            quarantine_key=event.quarantine_key,
            retried_at=event.retried_at,
        )
        known = self._failures.get(event.position)
        if known is None or _order_of(failure) > _order_of(known):
            self._failures[event.position] = failure

    def _settle(self, position: int, outcome: Outcome | None, city: CityUnderWay) -> None:
        """Keep a city as under way, or count it as served, or drop it once it has failed."""
        ended = outcome in {Outcome.UNCHANGED, Outcome.STORED}
        if ended and all(city.folded.get(country, 0) >= revision for country, revision in city.published.items()):
            self._under_way.pop(position, None)
            self._served |= bitmap.member(position)
            self._bytes_done = min(self._bytes_done + city.bytes_done, EXACT_MAX)
            self._trips_done = min(self._trips_done + city.trips_done, EXACT_MAX)
        elif outcome in {Outcome.FAILED, Outcome.SKIPPED} and not city.folded:
            self._under_way.pop(position, None)
        else:
            self._under_way[position] = city


def _order_of(failure: Failure) -> tuple[float, str, str, str]:
    retried_at_s = failure.retried_at.timestamp() if failure.retried_at else 0.0
    return retried_at_s, failure.reason, failure.quarantine_key or "", failure.city_name


def _progressed(city: CityUnderWay, event: CityProgressed) -> CityUnderWay:
    return msgspec.structs.replace(
        city,
        bytes_done=max(city.bytes_done, event.bytes_done),
        bytes_total=event.bytes_total,
        trips_done=max(city.trips_done, event.trips_done),
    )


def _finished(city: CityUnderWay, event: CityFinished) -> CityUnderWay:
    size_bytes = max(city.bytes_done, event.size_bytes)
    return msgspec.structs.replace(
        city,
        bytes_done=size_bytes,
        bytes_total=size_bytes,
        trips_done=max(city.trips_done, event.trips),
        published=_highest(city.published, ((pair.country, pair.revision) for pair in event.published)),
    )


def _highest(known: dict[CountrySlug, int], pairs: Iterable[tuple[CountrySlug, int]]) -> dict[CountrySlug, int]:
    result = dict(known)
    for country, revision in pairs:
        result[country] = max(revision, result.get(country, 0))
    return dict(sorted(result.items()))
