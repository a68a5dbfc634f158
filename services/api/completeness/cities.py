"""The cities that a country-day lacks: why each is missing, and when its file is usually ingested."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from statistics import median_low

import msgspec

from services.api.completeness.facts import layout_of
from services.api.completeness.model import CityState, CountryDayCities, MissingCity
from services.api.completeness.reader import CompletenessReader
from services.api.http.deadline import deadline
from services.api.http.unreadable import RequestedObjectUnreadable, UnreadableObject, get_if_readable
from services.api.statistics.reader import SummaryReader
from shared.domain import bitmap, keys
from shared.domain.events import Outcome
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import CorruptObject, Plan, PlannedCity, RequestRecord, Summary
from shared.domain.requests import status_of
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore

READING_DEADLINE_S = 30.0
CONCURRENT_GETS_MAX = 8
LISTED_MAX = 100
EARLIER_DAYS = 14
SAMPLES_MIN = 3
DELAY_MAX = dt.timedelta(days=7)
"""A file that was ingested later than this after its date was processed for the past, which tells nothing."""


class MissingCities:
    """Reads the cities that a country-day lacks."""

    def __init__(self, store: ObjectStore, summaries: SummaryReader, completeness: CompletenessReader) -> None:
        self._store = store
        self._summaries = summaries
        self._completeness = completeness

    async def read(self, country: CountrySlug, date: dt.date) -> CountryDayCities | None:
        """Return the cities that a country-day lacks, or None if the plan of the date has no city of the country.

        Reads the plan, the latest request, and the summaries of the day and of the EARLIER_DAYS before it. Raises
        RequestedObjectUnreadable if the plan cannot be read.
        """
        async with deadline(READING_DEADLINE_S, f"Reading the missing cities of {country} on {date}"):
            plan = await get_if_readable(self._store, Plan, keys.plan(date))
            if isinstance(plan, UnreadableObject):
                raise RequestedObjectUnreadable(plan)
            if plan is None or country not in plan.countries:
                return None
            summary = await self._summary(country, date)
            missing = missing_of(plan, country, summary, (await self._completeness.facts_of(date)).record)
            days = range(1, min(EARLIER_DAYS, date.toordinal() - 1) + 1) if missing else ()
            earlier = await bounded_map(
                lambda back: self._summary(country, date - dt.timedelta(days=back)), days, limit=CONCURRENT_GETS_MAX
            )
        usual = usual_delays([one for one in earlier if one is not None])
        midnight = dt.datetime.combine(date, dt.time(), dt.UTC)
        return CountryDayCities(
            country=country,
            date=date,
            missing_total=len(missing),
            missing=tuple(
                _with_usual(city, midnight, usual.get(CityId(city.city_id))) for city in missing[:LISTED_MAX]
            ),
        )

    async def _summary(self, country: CountrySlug, date: dt.date) -> Summary | None:
        try:
            return await self._summaries.summary(country, date)
        except CorruptObject:
            return None


def missing_of(
    plan: Plan, country: CountrySlug, summary: Summary | None, record: RequestRecord | None
) -> list[MissingCity]:
    """Return the cities of a plan that a summary does not count, by city id, as the latest request explains them."""
    counted = {city_id for city_id, entry in (summary.ledger if summary else {}).items() if entry.contribution}
    explains = record is not None and record.plan_revision == plan.revision
    positions = layout_of(plan).positions_of(country)
    missing = [
        _explained(city, position, record if explains else None)
        for city, position in zip(plan.countries[country].cities, positions, strict=True)
        if city.city_id not in counted
    ]
    return sorted(missing, key=lambda city: city.city_id)


def _explained(city: PlannedCity, position: int, record: RequestRecord | None) -> MissingCity:
    failure, state = None, CityState.MISSING
    if record is not None:
        failure = record.failures.get(position)
        if bitmap.contains(bitmap.decode(record.outcomes.get(Outcome.FAILED, "0")), position):
            state = CityState.REFUSED if failure is not None and failure.quarantine_key else CityState.FAILED
        elif bitmap.contains(bitmap.decode(record.outcomes.get(Outcome.SKIPPED, "0")), position):
            state = CityState.SKIPPED
        elif position in record.under_way:
            state = CityState.RUNNING
        elif not status_of(record).ended:
            state = CityState.WAITING
    return MissingCity(
        city_id=city.city_id,
        city_name=city.name,
        state=state,
        reason=failure.reason if failure else None,
        quarantine_key=failure.quarantine_key if failure else None,
    )


def usual_delays(earlier: Sequence[Summary]) -> dict[CityId, dt.timedelta]:
    """Return how long after the beginning of its date (UTC) the file of each city is usually ingested: the median.

    Cities of which fewer than SAMPLES_MIN files are known are left out.
    """
    delays: dict[CityId, list[dt.timedelta]] = {}
    for summary in earlier:
        midnight = dt.datetime.combine(summary.date, dt.time(), dt.UTC)
        for city_id, entry in summary.ledger.items():
            if entry.ingested_at is not None and entry.ingested_at - midnight <= DELAY_MAX:
                delays.setdefault(city_id, []).append(entry.ingested_at - midnight)
    return {city_id: median_low(known) for city_id, known in delays.items() if len(known) >= SAMPLES_MIN}


def _with_usual(city: MissingCity, midnight: dt.datetime, delay: dt.timedelta | None) -> MissingCity:
    return city if delay is None else msgspec.structs.replace(city, usual_at=midnight + delay)
