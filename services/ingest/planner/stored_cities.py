"""Chooses the cities of a date whose stored files are read again."""

from __future__ import annotations

import datetime as dt

import msgspec
import structlog

from shared.domain import keys
from shared.domain.events import Background
from shared.domain.ids import CountrySlug
from shared.domain.objects import CorruptObject, Manifest, NewerObject, Plan, PlannedCity, PlannedCountry
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository, read_plan

CONCURRENT_READS_MAX = 16

_log = structlog.get_logger()


async def read_stored_cities(store: ObjectStore, date: dt.date, wanted: Background, *, without_plan: Plan) -> Plan:
    """Return the plan of a date, limited to the wanted cities, with the cities that only have a stored file.

    The summaries count those too. ``without_plan`` is the plan if the date has none.
    """
    plan = await read_plan(store, date) or without_plan
    planned = {keys.manifest(date, city.city_id) for country in plan.countries.values() for city in country.cities}
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
    return limited_plan(plan, wanted, [manifest for manifest in manifests if manifest is not None])


def limited_plan(plan: Plan, wanted: Background, unplanned: list[Manifest]) -> Plan:
    """Return a plan of the wanted cities among those of a plan and the unplanned ones."""
    cities = {country: list(planned.cities) for country, planned in plan.countries.items()}
    names: dict[CountrySlug, str] = {country: planned.name for country, planned in plan.countries.items()}
    for manifest in unplanned:
        city = PlannedCity(city_id=manifest.city_id, upstream_id=manifest.city_id, name=manifest.city_name)
        cities.setdefault(manifest.country, []).append(city)
        names.setdefault(manifest.country, manifest.country_name)
    chosen = {
        country: tuple(city for city in found if wanted.city_id in {None, city.city_id, city.upstream_id})
        for country, found in sorted(cities.items())
        if wanted.country in {None, country}
    }
    return msgspec.structs.replace(
        plan,
        countries={c: PlannedCountry(name=names[c], cities=some) for c, some in chosen.items() if some},
        gone={},
        bad_cities_count=0,
        bad_cities=(),
    )
