"""Compares a country-day in two generations, before a flip from one to the other. Pure: no I/O, no clock."""

from __future__ import annotations

import datetime as dt

import msgspec

from services.aggregate.fold import comparable_ledgers
from shared.domain.contribution import Totals
from shared.domain.ids import CountrySlug
from shared.domain.objects import LedgerEntry, Summary

NAMED_MAX = 20


class GenerationFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a country-day in one generation."""

    version: int
    totals: Totals
    cities_reported: int
    cities_expected: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A country-day that differs between two generations.

    ``why`` lists the differences: the plan, cities, or fields that do not follow from the ledger. ``goes_back`` lists
    the revisions that are newer in the live generation than in the built one.
    """

    date: dt.date
    country: CountrySlug
    live: GenerationFigures | None
    built: GenerationFigures | None
    why: tuple[str, ...]
    goes_back: tuple[str, ...] = ()


def change_of(live: Summary | None, built: Summary | None, *, unreadable: bool = False) -> Change | None:
    """Compare a country-day of both generations; None if they agree. ``unreadable``: the live summary is damaged."""
    either = live or built
    if either is None or (live and built and live.has_content_of(built)):
        return None
    return Change(
        date=either.date,
        country=either.country,
        live=_side(live),
        built=_side(built),
        why=("the summary of the live generation cannot be read",) if unreadable else _reasons(live, built),
        goes_back=_goes_back(live, built) if live else (),
    )


def _reasons(live: Summary | None, built: Summary | None) -> tuple[str, ...]:
    if live is None or built is None:
        return ("the live generation does not have it" if live is None else "no manifest or plan has it",)
    before, after = comparable_ledgers(live, built)
    differences = [
        f"city {city_id}: {of_city}"
        for city_id in sorted({*before, *after})
        if (of_city := _city_reason(before.get(city_id), after.get(city_id))) is not None
    ]
    if live.plans != built.plans:
        differences.insert(0, f"plan: revision {live.plan_revision or 'none'} → {built.plan_revision or 'none'}")
    if not differences:
        names = [name for name in live.__struct_fields__ if name != "schema_version"]
        fields = [name for name in names if getattr(live, name) != getattr(built, name)]
        differences.append(f"equal ledgers, but {', '.join(fields)}")
    return _bounded(differences)


def _city_reason(live: LedgerEntry | None, built: LedgerEntry | None) -> str | None:
    if live == built:
        return None
    before, after = (entry.revision if entry else "none" for entry in (live, built))
    return f"other content under revision {after}" if before == after else f"revision {before} → {after}"


def _bounded(differences: list[str]) -> tuple[str, ...]:
    more = [f"and {len(differences) - NAMED_MAX} more"] if len(differences) > NAMED_MAX else []
    return (*differences[:NAMED_MAX], *more)


def _goes_back(live: Summary, built: Summary | None) -> tuple[str, ...]:
    ledger = built.ledger if built else {}
    older = [
        f"city {city_id}: revision {ledger[city_id].revision if city_id in ledger else 'none'} after {entry.revision}"
        for city_id, entry in live.ledger.items()
        if city_id not in ledger or ledger[city_id].revision < entry.revision
    ]
    plan_revision = built.plan_revision if built else 0
    if plan_revision < live.plan_revision:
        older.insert(0, f"plan: revision {plan_revision or 'none'} after {live.plan_revision}")
    return _bounded(older)


def _side(summary: Summary | None) -> GenerationFigures | None:
    if summary is None:
        return None
    return GenerationFigures(
        version=summary.version,
        totals=summary.totals,
        cities_reported=summary.cities_reported,
        cities_expected=summary.cities_expected,
    )
