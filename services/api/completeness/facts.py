"""The facts that explain a date beside its summaries: its plan, latest request, backfills and deadlines. Pure."""

from __future__ import annotations

import datetime as dt
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from services.api.http.date_range import DateRange
from shared.domain import bitmap
from shared.domain.backfills import dates_total, positions_to_retry
from shared.domain.events import Outcome
from shared.domain.ids import CountrySlug
from shared.domain.objects import Backfill, Failure, Plan, RequestRecord, Schedule
from shared.domain.requests import status_of


class PlanLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The countries of a plan in its order, and the position of the first city of each. ``cities`` counts all."""

    revision: int
    countries: tuple[CountrySlug, ...]
    begins: tuple[int, ...]
    cities: int

    def country_at(self, position: int) -> CountrySlug:
        """Return the country of the city at a position."""
        return self.countries[bisect_right(self.begins, position) - 1]

    def positions_of(self, country: CountrySlug) -> range:
        """Return the positions of a country's cities."""
        if country not in self.countries:
            return range(0)
        place = self.countries.index(country)
        ends = (*self.begins[1:], self.cities)
        return range(self.begins[place], ends[place])


def layout_of(plan: Plan) -> PlanLayout:
    """Return the layout of a plan."""
    begins, cities = [], 0
    for planned in plan.countries.values():
        begins.append(cities)
        cities += len(planned.cities)
    return PlanLayout(revision=plan.revision, countries=tuple(plan.countries), begins=tuple(begins), cities=cities)


class Lacking(msgspec.Struct, frozen=True, kw_only=True):
    """The cities that a request did not bring: how many of each kind, and the first failure."""

    failed: int = 0
    refused: int = 0
    skipped: int = 0
    example: Failure | None = None


def lacking_of(record: RequestRecord, layout: PlanLayout | None) -> dict[CountrySlug, Lacking]:
    """Return what a request did not bring, by country. Nothing is known if its plan was replaced.

    The record names the first failures, so further refused files count as failed.
    """
    if layout is None or record.plan_revision != layout.revision or record.cities != layout.cities:
        return {}
    counts: dict[CountrySlug, Counter[str]] = {}
    examples: dict[CountrySlug, Failure] = {}
    for outcome in (Outcome.FAILED, Outcome.SKIPPED):
        for position in bitmap.members(record.outcomes.get(outcome, "0")):
            failure = record.failures.get(position)
            country = layout.country_at(position)
            refused = failure is not None and failure.quarantine_key is not None
            counts.setdefault(country, Counter())["refused" if refused else outcome.value] += 1
            if failure is not None and (country not in examples or refused):
                examples[country] = failure
    return {country: Lacking(**found, example=examples.get(country)) for country, found in counts.items()}


class MissedDeadline(msgspec.Struct, frozen=True, kw_only=True):
    """A deadline of a schedule that a date has missed."""

    at: dt.datetime
    schedule: str


class DateFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that explain a date.

    ``planned``: it has a plan. ``countries``: those of its plan. ``requested``: a request of it waits that has no
    record yet. ``record``: its latest request. ``lacking``: what this request did not bring, by country. ``backfill``:
    the open backfill that is going to process it. ``processable``: clients may request it. The plan and the record of
    a complete date are not read.
    """

    date: dt.date
    planned: bool = False
    countries: tuple[CountrySlug, ...] = ()
    requested: bool = False
    record: RequestRecord | None = None
    lacking: Mapping[CountrySlug, Lacking] = {}
    backfill: Backfill | None = None
    deadline: MissedDeadline | None = None
    processable: bool = True

    @property
    def active(self) -> bool:
        """Whether a request of the date has not ended."""
        return self.requested or (self.record is not None and not status_of(self.record).ended)


def missed_deadlines(schedules: Iterable[Schedule], now: dt.datetime) -> dict[dt.date, MissedDeadline]:
    """Return the earliest deadline that each date has missed. A schedule forgets the deadlines that were met."""
    missed: dict[dt.date, MissedDeadline] = {}
    for schedule in schedules:
        for deadline in schedule.deadlines:
            earlier = missed.get(deadline.date)
            if deadline.at <= now and (earlier is None or deadline.at < earlier.at):
                missed[deadline.date] = MissedDeadline(at=deadline.at, schedule=schedule.name)
    return missed


def awaited_dates(backfills: Iterable[Backfill], days: DateRange) -> dict[dt.date, Backfill]:
    """Return the dates that open backfills are going to process or to retry, each with the first such backfill."""
    awaited: dict[dt.date, Backfill] = {}
    for backfill in backfills:
        if backfill.status.ended:
            continue
        ahead = {*backfill.under_way, *positions_to_retry(backfill)}
        for date in days.dates():
            position = (backfill.last - date if backfill.newest_first else date - backfill.first).days
            if position in ahead or backfill.cursor <= position < dates_total(backfill):
                awaited.setdefault(date, backfill)
    return awaited
