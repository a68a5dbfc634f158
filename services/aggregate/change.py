"""What a flip from one generation to another would change of a country-day. Pure."""

from __future__ import annotations

import datetime as dt

import msgspec

from shared.contribution import Contribution
from shared.identity import CountrySlug
from shared.objects import Summary

NAMED_MAX = 20


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """What one generation says of a country-day."""

    version: int
    totals: Contribution
    cities_reported: int
    cities_expected: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A country-day that two generations do not agree about.

    ``goes_back`` names what is newer in the live generation than in the built one: the plan, and cities.
    """

    date: dt.date
    country: CountrySlug
    live: Side | None
    built: Side | None
    goes_back: tuple[str, ...] = ()


def change_of(live: Summary | None, built: Summary | None) -> Change | None:
    """Compare a country-day of both generations; None if they agree."""
    either = live or built
    if either is None or live == built:
        return None
    return Change(
        date=either.date,
        country=either.country,
        live=_side(live),
        built=_side(built),
        goes_back=_goes_back(live, built) if live else (),
    )


def _goes_back(live: Summary, built: Summary | None) -> tuple[str, ...]:
    ledger = built.ledger if built else {}
    back = [
        f"city {city_id}: revision {ledger[city_id].revision if city_id in ledger else 'none'} after {entry.revision}"
        for city_id, entry in live.ledger.items()
        if city_id not in ledger or ledger[city_id].revision < entry.revision
    ]
    plan_revision = built.plan_revision if built else 0
    if plan_revision < live.plan_revision:
        back.insert(0, f"plan: revision {plan_revision or 'none'} after {live.plan_revision}")
    more = [f"and {len(back) - NAMED_MAX} more"] if len(back) > NAMED_MAX else []
    return (*back[:NAMED_MAX], *more)


def _side(summary: Summary | None) -> Side | None:
    if summary is None:
        return None
    return Side(
        version=summary.version,
        totals=summary.totals,
        cities_reported=summary.cities_reported,
        cities_expected=summary.cities_expected,
    )
