"""Derives the state of each country-day and date, the reason and the next action. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from services.api.completeness.facts import DateFacts, Lacking
from services.api.completeness.model import (
    Action,
    CompletenessGrid,
    CountryDayState,
    CountryStates,
    DateState,
    DayState,
)
from services.api.http.unreadable import UnreadableObject
from shared.domain import keys
from shared.domain.ids import CountrySlug
from shared.domain.objects import BackfillStatus, SummaryHead
from shared.domain.requests import Status, counts_of, status_of

NOTHING_LACKING = Lacking()
# A date is in the most urgent state of its country-days.
URGENCY = (
    DayState.UNREADABLE,
    DayState.REFUSED,
    DayState.FAILED,
    DayState.LATE,
    DayState.CANCELLED,
    DayState.RUNNING,
    DayState.PROVISIONAL,
    DayState.NOT_REQUESTED,
    DayState.COMPLETE,
    DayState.NOT_EXPECTED,
)

_Found = tuple[DayState, str | None, Action | None]
_NOT_EXPECTED: _Found = (DayState.NOT_EXPECTED, None, None)


def grid_of(
    dates: Sequence[DateFacts],
    heads: Iterable[SummaryHead],
    unreadable: Sequence[UnreadableObject],
    names: Mapping[CountrySlug, str],
) -> CompletenessGrid:
    """Return the grid of a range. ``dates`` has each day of it; ``names`` has all countries that were ever planned."""
    by_day = {(head.country, head.date): head for head in heads}
    damaged = {(named[1], named[0]): one.reason for one in unreadable if (named := keys.parse_summary(one.key))}
    shown = {country for (country, _), head in by_day.items() if _is_expected(head)}
    shown |= {country for country, _ in damaged}
    shown |= {country for facts in dates for country in facts.countries}
    newest = {head.country: head.country_name for head in sorted(by_day.values(), key=lambda head: head.date)}
    countries = tuple(
        CountryStates(
            country=country,
            name=newest.get(country) or names.get(country, country),
            days=tuple(
                country_day(facts, country, by_day.get((country, facts.date)), damaged.get((country, facts.date)))
                for facts in dates
            ),
        )
        for country in sorted(shown or names)
    )
    return CompletenessGrid(
        last_ingested_at=_newest(head.last_ingested_at for head in by_day.values()),
        dates=tuple(_date(facts, [one.days[place] for one in countries]) for place, facts in enumerate(dates)),
        countries=countries,
        unreadable=tuple(unreadable),
    )


def country_day(
    facts: DateFacts, country: CountrySlug, head: SummaryHead | None, unreadable: str | None = None
) -> CountryDayState:
    """Return the state of a country-day. ``unreadable`` says why its summary cannot be read, if it cannot."""
    state, reason, action = (
        (DayState.UNREADABLE, unreadable, Action.REPAIR) if unreadable else _found(facts, country, head)
    )
    return CountryDayState(
        date=facts.date,
        state=state,
        cities_reported=head.cities_reported if head else 0,
        cities_expected=head.cities_expected if head else 0,
        last_ingested_at=head.last_ingested_at if head else None,
        reason=reason,
        action=action,
    )


def _found(facts: DateFacts, country: CountrySlug, head: SummaryHead | None) -> _Found:
    if head is not None and not _is_expected(head):
        return _NOT_EXPECTED
    if head is not None and head.complete:
        return DayState.COMPLETE, None, None
    ended = None if facts.active or facts.record is None else status_of(facts.record)
    explained = ended is Status.FAILED or facts.active or country in facts.countries
    if head is None and facts.planned and not explained:
        return _NOT_EXPECTED
    found = _of_request(facts, facts.lacking.get(country, NOTHING_LACKING), ended) or _waiting(facts, head)
    if facts.deadline is None or found[0] in {DayState.REFUSED, DayState.FAILED}:
        return found
    missed = f"Schedule {facts.deadline.schedule} wanted it by {_instant(facts.deadline.at)}"
    return DayState.LATE, f"{missed}. {found[1]}" if found[1] else missed, found[2]


def _of_request(facts: DateFacts, lacking: Lacking, ended: Status | None) -> _Found | None:
    """Return the state that the latest request explains, if it has ended and does."""
    if ended is None or facts.record is None:
        return None
    if ended is Status.FAILED:
        return DayState.FAILED, f"The request failed: {facts.record.failed_reason}", Action.RETRY
    # A cancelled request cannot be retried; a new one takes its place.
    again = Action.PROCESS if facts.record.cancelled_at is not None else Action.RETRY
    example = f" {lacking.example.city_name}: {lacking.example.reason}" if lacking.example else ""
    if lacking.refused:
        more = f", and {_cities(lacking.failed)} failed" if lacking.failed else ""
        return DayState.REFUSED, f"{_files(lacking.refused)} refused{more}.{example}", again
    if lacking.failed:
        return DayState.FAILED, f"{_cities(lacking.failed)} failed.{example}", again
    if ended is Status.CANCELLED:
        skipped = f" before it fetched {_cities(lacking.skipped)}" if lacking.skipped else ""
        return DayState.CANCELLED, f"The request was cancelled{skipped}", Action.PROCESS
    return None


def _waiting(facts: DateFacts, head: SummaryHead | None) -> _Found:
    """Return the state of an incomplete day that no ended request explains."""
    if facts.active:
        counts = counts_of(facts.record) if facts.record is not None else None
        if counts is None or not counts.cities_total:
            return DayState.RUNNING, "A request is about to begin", Action.WAIT
        done = f"{counts.cities_done:,} of {_cities(counts.cities_total)} of the date are done"
        return DayState.RUNNING, f"A request is running: {done}", Action.WAIT
    if facts.backfill is not None:
        paused = facts.backfill.status is BackfillStatus.PAUSED
        reason = "The backfill that is to process it is paused" if paused else "A backfill is going to process it"
        return DayState.RUNNING, reason, Action.WAIT
    process = Action.PROCESS if facts.processable else None
    if head is None and facts.planned:
        return DayState.PROVISIONAL, "Its cities are planned, and none is counted yet", process
    if head is None:
        return DayState.NOT_REQUESTED, "Nobody has requested this date", process
    missing = _cities(head.cities_expected - head.cities_reported)
    reason = f"{missing} missing" if head.cities_expected else "The number of its cities is not known yet"
    return DayState.PROVISIONAL, reason, process


def _date(facts: DateFacts, days: Sequence[CountryDayState]) -> DateState:
    none = days or [country_day(facts, CountrySlug(""), None)]
    worst = min(none, key=lambda day: URGENCY.index(day.state))
    return DateState(
        **msgspec.structs.asdict(worst)
        | {
            "cities_reported": sum(day.cities_reported for day in days),
            "cities_expected": sum(day.cities_expected for day in days),
            "last_ingested_at": _newest(day.last_ingested_at for day in days),
        },
        request_id=facts.record.request_id if facts.record else None,
        request_status=status_of(facts.record) if facts.record else None,
        backfill_id=facts.backfill.backfill_id if facts.backfill else None,
        deadline=facts.deadline.at if facts.deadline and worst.state is not DayState.COMPLETE else None,
    )


def _is_expected(head: SummaryHead) -> bool:
    return bool(head.cities_expected or head.has_data)


def _newest(instants: Iterable[dt.datetime | None]) -> dt.datetime | None:
    return max((instant for instant in instants if instant is not None), default=None)


def _instant(at: dt.datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _cities(count: int) -> str:
    return "1 city" if count == 1 else f"{count:,} cities"


def _files(count: int) -> str:
    return "1 file was" if count == 1 else f"{count:,} files were"
