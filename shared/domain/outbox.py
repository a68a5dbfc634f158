"""The events of a stored manifest or plan. Both are outboxes: their events can be published again from the bucket."""

from __future__ import annotations

from msgspec import UNSET

from shared.domain.events import PLAN_CHUNK_CITIES_MAX, CityDayRetracted, CityDayStats, CountryDayPlanned
from shared.domain.ids import CountrySlug
from shared.domain.objects import Manifest, Plan


def events_of_manifest(manifest: Manifest) -> tuple[CityDayStats | CityDayRetracted, ...]:
    """Return the statistics of the current revision, and a retraction for each country that the city has left."""
    stats = CityDayStats(
        date=manifest.date,
        country=manifest.country,
        country_name=manifest.country_name,
        city_id=manifest.city_id,
        city_name=manifest.city_name,
        revision=manifest.revision,
        contribution=manifest.contribution,
        trips_on_other_dates=manifest.trips_on_other_dates,
        raw_key=manifest.raw_key,
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        rule_version=manifest.rule_version,
        ingested_at=manifest.ingested_at,
        bad_records=manifest.bad_records,
        suspicious=manifest.suspicious or UNSET,
    )
    retractions = (
        CityDayRetracted(date=manifest.date, country=country, city_id=manifest.city_id, revision=revision)
        for country, revision in sorted(manifest.retracted.items())
    )
    return (stats, *retractions)


def events_of_plan(plan: Plan, country: CountrySlug) -> tuple[CountryDayPlanned, ...]:
    """Return the expected cities of one country in chunks; one empty chunk for a country without cities."""
    planned = plan.countries.get(country)
    name = planned.name if planned else plan.gone[country]
    city_ids = tuple(city.city_id for city in planned.cities) if planned else ()
    starts = range(0, max(len(city_ids), 1), PLAN_CHUNK_CITIES_MAX)
    return tuple(
        CountryDayPlanned(
            date=plan.date,
            country=country,
            country_name=name,
            plan_revision=plan.revision,
            city_ids=city_ids[start : start + PLAN_CHUNK_CITIES_MAX],
            chunk=chunk,
            chunks=len(starts),
        )
        for chunk, start in enumerate(starts)
    )
