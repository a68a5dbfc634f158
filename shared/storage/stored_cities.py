"""Finds the cities of a date whose stored files a reprocessing reads again."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence

import structlog

from shared.domain import keys
from shared.domain.events import Background
from shared.domain.ids import CountrySlug
from shared.domain.objects import CorruptObject, Manifest, NewerObject, Plan, PlannedCity, PlannedCountry
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

CONCURRENT_READS_MAX = 16

_log = structlog.get_logger()


async def read_stored_cities(
    store: ObjectStore, date: dt.date, wanted: Background, plan: Plan | None
) -> dict[CountrySlug, PlannedCountry]:
    """Return the wanted cities of a date by country: those of its plan, and those that only have a stored file.

    The summaries count the latter too. An unreadable manifest of a city without a plan is left out.
    """
    countries = plan.countries if plan else {}
    planned = {keys.manifest(date, city.city_id) for country in countries.values() for city in country.cities}
    others = [listed.key async for listed in store.list(keys.manifests_of(date)) if listed.key not in planned]

    async def read(key: str) -> Manifest | None:
        try:
            return await Repository(store).get(Manifest, key)
        except NewerObject:
            raise
        except CorruptObject as error:
            _log.error("object_unreadable", key=key, error=str(error))
            return None

    manifests = await bounded_map(read, others, limit=CONCURRENT_READS_MAX)
    return wanted_cities(countries, wanted, [manifest for manifest in manifests if manifest is not None])


def wanted_cities(
    countries: Mapping[CountrySlug, PlannedCountry], wanted: Background, unplanned: Sequence[Manifest]
) -> dict[CountrySlug, PlannedCountry]:
    """Return the wanted cities among the planned and the unplanned ones, without countries that have none of them."""
    cities = {country: list(planned.cities) for country, planned in countries.items()}
    names = {country: planned.name for country, planned in countries.items()}
    for manifest in unplanned:
        city = PlannedCity(city_id=manifest.city_id, upstream_id=manifest.city_id, name=manifest.city_name)
        cities.setdefault(manifest.country, []).append(city)
        names.setdefault(manifest.country, manifest.country_name)
    chosen = {
        country: tuple(city for city in found if wanted.city_id in {None, city.city_id, city.upstream_id})
        for country, found in sorted(cities.items())
        if wanted.country in {None, country}
    }
    return {country: PlannedCountry(name=names[country], cities=some) for country, some in chosen.items() if some}
