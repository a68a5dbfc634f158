"""Compares a summary with the one that manifests and plan give. Pure: no I/O, no clock."""

from __future__ import annotations

import datetime as dt

import msgspec

from services.aggregate.audit.recount import Recount
from services.aggregate.fold import comparable_ledgers, empty_summary
from shared.domain import objects, schema
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import LedgerEntry, Manifest, Summary

NOTHING = "nothing"
SUMMARY = "summary"
RAW_OBJECT = "raw object"
"""Every difference of a raw object begins with this."""
RAW_EXPIRED = "expired raw object"
"""A raw object that is missing because it has expired."""
LEDGER_ENTRY = "ledger entry"
"""Ledger and manifest differ under one revision."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A difference from the bucket's manifests and plan.

    ``in_flight`` marks a manifest or plan that is ahead of the summary. Its event may still be in Kafka, so the caller
    must read both again before the difference counts.
    """

    date: dt.date
    country: CountrySlug
    city_id: CityId | None = None
    what: str
    found: str
    expected: str
    in_flight: bool = False


def differences(expected: Summary | None, found: Summary | None) -> list[Difference]:
    """Compare the summary of a country-day with the expected one. The result is empty if and only if they are equal.

    Read ``found`` before the manifests that ``expected`` is built from: then only the manifests can be ahead.
    """
    if expected is None or found is None:
        return _missing_on_one_side(expected, found)
    wanted, present = comparable_ledgers(expected, found)
    found_differences = [
        *_of_plans(expected, found),
        *(
            difference
            for city_id in sorted({*wanted, *present})
            if (difference := _of_city(expected, city_id, wanted.get(city_id), present.get(city_id))) is not None
        ),
    ]
    if found_differences:
        return found_differences
    # The ledger and the plan are equal, so any other difference was computed or written wrong.
    return [
        _difference(expected, what=field, found=_text(getattr(found, field)), expected=_text(getattr(expected, field)))
        for field in expected.__struct_fields__
        if field not in {"ledger", "plans", "schema_version"} and getattr(found, field) != getattr(expected, field)
    ]


def byte_differences(found: Summary, body: bytes) -> list[Difference]:
    """Compare the bytes of a summary whose content is right with the canonical bytes.

    A reader of only the first bytes relies on their order. A summary of an earlier build may have other bytes.
    """
    canonical = objects.encode(found)
    if body == canonical or found.schema_version < schema.written_version():
        return []
    return [
        _difference(
            found, what="bytes", found=f"{len(body)} bytes, encoded differently", expected=f"{len(canonical)} bytes"
        )
    ]


def raw_differences(manifest: Manifest, recount: Recount) -> list[Difference]:
    """Compare the figures of a manifest with those that the audit parser reads in its raw object."""
    pairs = {
        "sha256": (recount.sha256, manifest.sha256),
        "size_bytes": (recount.size_bytes, manifest.size_bytes),
        "trips": (recount.trips, manifest.contribution.trips),
        "passengers": (recount.passengers, manifest.contribution.passengers),
        "accidents": (recount.accidents, manifest.contribution.accidents),
        "delay_total_ms": (recount.delay_total_ms, manifest.contribution.delay_total_ms),
        "trips_on_other_dates": (recount.trips_on_other_dates, manifest.trips_on_other_dates),
        "bad_records": (recount.bad_records, manifest.bad_records),
    }
    if recount.bad_records and not manifest.bad_records:
        return [of_raw_object(manifest, what=RAW_OBJECT, found=recount.first_bad, expected="no bad record")]
    return [
        of_raw_object(manifest, what=f"{RAW_OBJECT}: {what}", found=str(found), expected=str(expected))
        for what, (found, expected) in pairs.items()
        if found != expected
    ]


def of_raw_object(manifest: Manifest, *, what: str, found: str, expected: str) -> Difference:
    """Return a difference of the raw object that a manifest names."""
    return Difference(
        date=manifest.date,
        country=manifest.country,
        city_id=manifest.city_id,
        what=what,
        found=found,
        expected=expected,
    )


def _missing_on_one_side(expected: Summary | None, found: Summary | None) -> list[Difference]:
    if expected is not None:
        return [
            _difference(expected, what=SUMMARY, found=NOTHING, expected=f"version {expected.version}", in_flight=True)
        ]
    if found is not None and not found.has_content_of(empty_summary(found.date, found.country)):
        return [_difference(found, what=SUMMARY, found=f"version {found.version}", expected=NOTHING)]
    return []


def _of_plans(expected: Summary, found: Summary) -> list[Difference]:
    if expected.plans == found.plans:
        return []
    return [
        _difference(
            expected,
            what="plan",
            found=_plan_text(found),
            expected=_plan_text(expected),
            in_flight=found.plan_revision < expected.plan_revision,
        )
    ]


def _plan_text(summary: Summary) -> str:
    if not summary.plan_revision:
        return NOTHING
    return f"revision {summary.plan_revision}, {summary.cities_expected} cities of {summary.country_name}"


def _of_city(
    expected: Summary, city_id: CityId, entry: LedgerEntry | None, found: LedgerEntry | None
) -> Difference | None:
    if entry == found:
        return None
    if entry is None or found is None or entry.revision != found.revision:
        ahead = entry is not None and (found is None or found.revision < entry.revision)
        return _difference(
            expected,
            city_id=city_id,
            what="revision",
            found=NOTHING if found is None else str(found.revision),
            expected=NOTHING if entry is None else str(entry.revision),
            in_flight=ahead,
        )
    return _difference(expected, city_id=city_id, what=LEDGER_ENTRY, found=_text(found), expected=_text(entry))


def _text(value: object) -> str:
    if value is msgspec.UNSET:
        return NOTHING
    return msgspec.json.encode(value, order="deterministic").decode()


def _difference(
    summary: Summary,
    *,
    what: str,
    found: str,
    expected: str,
    city_id: CityId | None = None,
    in_flight: bool = False,
) -> Difference:
    return Difference(
        date=summary.date,
        country=summary.country,
        city_id=city_id,
        what=what,
        found=found,
        expected=expected,
        in_flight=in_flight,
    )
