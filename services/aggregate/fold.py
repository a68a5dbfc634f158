"""The fold: merges events into the summary of a country-day. Pure: no I/O, no clock.

The fold is a join, so it is commutative, associative and idempotent on any input:

- For each city the ledger keeps the entry of the highest revision. A retraction stays as a tombstone.
- If two entries have equal revisions, it keeps the one with the greater canonical bytes.
- It keeps the plan with the highest revision.
- The country has the name that this plan gives it. Without a plan, the entry of the highest revision names it. Only
  then do entries keep the name: once a plan is in force, one always is.

The encoding is canonical, and nothing in a summary comes from the service that folds. So the order, the duplicates and
the batches of the events never change a byte of a summary.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence

import msgspec
from msgspec import UNSET

from shared.domain.contribution import total_of
from shared.domain.events import CityDayRetracted, CityDayStats, CountryDayPlanned, Event
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import LedgerEntry, PlanChunks, Summary

StatEvent = CityDayStats | CityDayRetracted | CountryDayPlanned

_STAT_EVENTS = (CityDayStats, CityDayRetracted, CountryDayPlanned)
_encoder = msgspec.json.Encoder(order="deterministic")


def empty_summary(date: dt.date, country: CountrySlug) -> Summary:
    """Return a summary without events: the identity of the join."""
    return Summary(date=date, country=country)


def fold(summary: Summary, folded: Iterable[StatEvent]) -> Summary:
    """Fold events of one country-day into its summary.

    Returns ``summary`` itself if they change nothing. Raises ValueError for an event of another country-day.
    """
    date, country = summary.date, summary.country
    entries: list[tuple[CityId, LedgerEntry]] = []
    plans: list[PlanChunks] = []
    for event in folded:
        if event.country != country or event.date != date:
            raise ValueError(f"{event.key} is not an event of {date}/{country}")
        match event:
            case CityDayStats():
                entries.append((event.city_id, _entry_of(event)))
            case CityDayRetracted():
                entries.append((event.city_id, LedgerEntry(revision=event.revision)))
            case CountryDayPlanned():
                plans.append(_chunk_of(event))
    return _joined(summary, entries, plans)


def join(summary: Summary, other: Summary) -> Summary:
    """Join two summaries of one country-day. The result equals a fold of the events of both.

    Returns ``summary`` itself if the other changes nothing. Raises ValueError for one of another country-day.
    """
    if (other.date, other.country) != (summary.date, summary.country):
        raise ValueError(f"{other.date}/{other.country} is not {summary.date}/{summary.country}")
    return _joined(summary, other.ledger.items(), other.plans)


def comparable_ledgers(one: Summary, other: Summary) -> tuple[dict[CityId, LedgerEntry], dict[CityId, LedgerEntry]]:
    """Return the ledgers of two summaries; without names if one of the two alone has a plan in force."""
    if bool(one.plan_revision) == bool(other.plan_revision):
        return one.ledger, other.ledger
    return _without_names(one.ledger), _without_names(other.ledger)


def superseded(summary: Summary, event: StatEvent) -> bool:
    """Return whether the summary already holds a higher revision than ``event`` for its city or its plan."""
    if isinstance(event, CountryDayPlanned):
        return summary.plan_revision > event.plan_revision
    entry = summary.ledger.get(event.city_id)
    return entry is not None and entry.revision > event.revision


def as_stat_event(event: Event) -> StatEvent:
    """Return ``event`` as a type that can be folded; its topic holds no other types."""
    assert isinstance(event, _STAT_EVENTS)
    return event


def _entry_of(event: CityDayStats) -> LedgerEntry:
    return LedgerEntry(
        revision=event.revision,
        city_name=event.city_name,
        contribution=event.contribution,
        trips_on_other_dates=event.trips_on_other_dates,
        sha256=event.sha256,
        ingested_at=event.ingested_at,
        suspicious=event.suspicious or "",
        country_name=event.country_name,
    )


def _chunk_of(event: CountryDayPlanned) -> PlanChunks:
    cities = {event.chunk: tuple(sorted(set(event.city_ids)))} if event.chunk < event.chunks else {}
    return PlanChunks(revision=event.plan_revision, chunks=event.chunks, country_name=event.country_name, cities=cities)


def _keep_greater(ledger: dict[CityId, LedgerEntry], city_id: CityId, entry: LedgerEntry) -> bool:
    known = ledger.get(city_id)
    if known is not None and not _is_greater(entry, known):
        return False
    ledger[city_id] = entry
    return True


def _is_greater(entry: LedgerEntry, known: LedgerEntry) -> bool:
    if entry.revision != known.revision:
        return entry.revision > known.revision
    return _order_of(entry) > _order_of(known)


def _order_of(entry: LedgerEntry) -> tuple[bytes, str]:
    """Return what decides between entries of one revision. The name comes last: a plan makes it irrelevant."""
    return _encoder.encode(_without_name(entry)), entry.country_name


def _without_names(ledger: dict[CityId, LedgerEntry]) -> dict[CityId, LedgerEntry]:
    return {city_id: _without_name(entry) for city_id, entry in ledger.items()}


def _without_name(entry: LedgerEntry) -> LedgerEntry:
    return msgspec.structs.replace(entry, country_name="") if entry.country_name else entry


def _last_of(instants: Sequence[dt.datetime | None]) -> dt.datetime | None:
    """Return the last instant. If it is written in two ways (``10:00Z``, ``12:00+02:00``), the greatest text wins."""
    known = [instant for instant in instants if instant is not None]
    if not known:
        return None
    last, zone = max(known), known[0].tzinfo
    if all(instant.tzinfo is zone for instant in known):  # in UTC, nearly always: one way to write it
        return last
    return max([instant for instant in known if instant == last], key=dt.datetime.isoformat)


def _joined(summary: Summary, entries: Iterable[tuple[CityId, LedgerEntry]], added: Iterable[PlanChunks]) -> Summary:
    plans = _joined_plans(summary.plans, added)
    plan = _in_force(plans)
    ledger = dict(summary.ledger)
    changed = plans != summary.plans
    if plan is not None and _in_force(summary.plans) is None:
        ledger = _without_names(ledger)
    for city_id, entry in entries:
        changed |= _keep_greater(ledger, city_id, entry if plan is None else _without_name(entry))
    return _with_totals(summary, ledger, plans) if changed else summary


def _joined_plans(known: tuple[PlanChunks, ...], added: Iterable[PlanChunks]) -> tuple[PlanChunks, ...]:
    """Return the highest complete plan and the incomplete plans above it, highest first."""
    plans = {(plan.revision, plan.chunks): plan for plan in known}
    for plan in added:
        key = (plan.revision, plan.chunks)
        plans[key] = _joined_chunks(plans[key], plan) if key in plans else plan
    kept = []
    for _, plan in sorted(plans.items(), reverse=True):
        kept.append(plan)
        if plan.whole:
            break
    return tuple(kept)


def _joined_chunks(plan: PlanChunks, other: PlanChunks) -> PlanChunks:
    chunks = sorted(plan.cities.keys() | other.cities.keys())
    return msgspec.structs.replace(
        plan,
        country_name=max(plan.country_name, other.country_name),
        cities={chunk: max(plan.cities.get(chunk, ()), other.cities.get(chunk, ())) for chunk in chunks},
    )


def _in_force(plans: tuple[PlanChunks, ...]) -> PlanChunks | None:
    return plans[-1] if plans and plans[-1].whole else None


def _name_of(plan: PlanChunks | None, ledger: dict[CityId, LedgerEntry]) -> str:
    if plan is not None:
        return plan.country_name
    named = [(entry.revision, entry.country_name) for entry in ledger.values() if entry.contribution is not None]
    return max(named)[1] if named else ""


def _with_totals(summary: Summary, ledger: dict[CityId, LedgerEntry], plans: tuple[PlanChunks, ...]) -> Summary:
    entries = ledger.values()
    contributions = [entry.contribution for entry in entries if entry.contribution is not None]
    plan = _in_force(plans)
    expected = {city for cities in plan.cities.values() for city in cities} if plan else set()
    missing = {city for city in expected if city not in ledger or ledger[city].contribution is None}
    plan_revision = plan.revision if plan else 0
    return msgspec.structs.replace(
        summary,
        country_name=_name_of(plan, ledger),
        version=sum([entry.revision for entry in entries]) + plan_revision,
        totals=total_of(contributions),
        has_data=bool(contributions),
        cities_reported=len(expected) - len(missing),
        cities_expected=len(expected),
        complete=plan is not None and not missing,
        last_ingested_at=_last_of([entry.ingested_at for entry in entries if entry.contribution is not None]),
        plan_revision=plan_revision,
        cities_suspicious=len([1 for entry in entries if entry.suspicious]) or UNSET,  # absent, as before it existed
        plans=plans,
        ledger={city_id: ledger[city_id] for city_id in sorted(ledger)},
    )
