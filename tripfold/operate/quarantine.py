"""What lies in quarantine, as an operator finds it and asks for it once more."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence

import msgspec

from shared.domain import bitmap, keys
from shared.domain.errors import OperatorError
from shared.domain.events import ProcessRequested
from shared.domain.ids import CityId, RequestId
from shared.domain.objects import QuarantineReport, RequestRecord
from shared.domain.requests import NothingToRetry
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository, read_plan
from tripfold.operate.requests import UnknownRequest, read_request, retry_request

GETS_AT_ONCE_MAX = 16
REPORTS_MAX = 100_000
"""So many reports are read by one command."""


class NothingQuarantined(OperatorError):
    """There is no such file in quarantine."""


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """Which files are meant: of some dates, both included, of a country's slug, of a city."""

    first: dt.date | None = None
    last: dt.date | None = None
    country: str | None = None
    city_id: str | None = None

    def has_date_of(self, key: str) -> bool:
        """Tell whether a key names one of the dates."""
        date = keys.parse_date(key)
        return (
            date is not None
            and (self.first is None or date >= self.first)
            and (self.last is None or date <= self.last)
            and (self.city_id is None or f"/city={self.city_id}/" in key)
        )


class Retried(msgspec.Struct, frozen=True, kw_only=True):
    """What came of asking again for files in quarantine: the city-days by request, and those that need no retry."""

    requests: tuple[ProcessRequested, ...]
    asked: tuple[QuarantineReport, ...]
    settled: tuple[QuarantineReport, ...]


async def read_reports(store: ObjectStore, chosen: Chosen) -> list[QuarantineReport]:
    """Return the reports on files in quarantine, by date and city, the latest of a city-day first."""
    found: list[str] = []
    prefix = keys.quarantine_of_date(chosen.first) if chosen.first and chosen.first == chosen.last else keys.QUARANTINE
    async for listed in store.list(prefix):
        if listed.key.endswith(keys.REPORT_SUFFIX) and chosen.has_date_of(listed.key):
            found.append(listed.key)
        if len(found) > REPORTS_MAX:
            raise OperatorError(f"more than {REPORTS_MAX} files are in quarantine: choose some with --from and --to")

    repository = Repository(store)
    reports = await bounded_map(lambda key: repository.get(QuarantineReport, key), found, limit=GETS_AT_ONCE_MAX)
    wanted = [report for report in reports if report is not None and chosen.country in {None, report.country}]
    return sorted(wanted, key=lambda report: (report.date, report.city_id, -report.quarantined_at.timestamp()))


async def read_city_day(store: ObjectStore, date: dt.date, city_id: str) -> list[QuarantineReport]:
    """Return the reports on a city-day, the latest first. Raises NothingQuarantined if there is none."""
    reports = await read_reports(store, Chosen(first=date, last=date, city_id=city_id))
    if not reports:
        where = f"city {city_id[:100]!r} on {date}"
        raise NothingQuarantined(f"no file of {where} is in quarantine; see 'tripfold quarantine list'")
    return reports


async def retry_reports(
    store: ObjectStore,
    publisher: Publisher,
    reports: Sequence[QuarantineReport],
    *,
    clock: Callable[[], dt.datetime],
) -> Retried:
    """Ask again for the city-days of reports: each in the request that last asked for it, whose failed city it is.

    A city-day that has not failed in that request is settled: it was taken in since.
    """
    by_request: dict[RequestId, list[QuarantineReport]] = {}
    for report in reports:
        by_request.setdefault(report.last_request_id, []).append(report)
    requested: list[ProcessRequested] = []
    asked: list[QuarantineReport] = []
    settled: list[QuarantineReport] = []
    for request_id, its_reports in by_request.items():
        try:
            record = await read_request(store, request_id)
            positions = await _positions(store, record, {report.city_id for report in its_reports})
            requested.append(await retry_request(store, request_id, clock(), positions=positions))
        except (NothingToRetry, UnknownRequest):
            settled += its_reports
        else:
            asked += its_reports
    await publisher.publish(map(OutgoingEvent, requested))
    return Retried(requests=tuple(requested), asked=tuple(asked), settled=tuple(settled))


async def _positions(store: ObjectStore, record: RequestRecord, city_ids: set[CityId]) -> int | None:
    """Return the places of cities in the plan of a request, as a bitmap; None, for all, if that plan has moved on."""
    plan = await read_plan(store, record.date)
    if plan is None or plan.revision != record.plan_revision:
        return None
    planned = (city.city_id for country in plan.countries.values() for city in country.cities)
    positions = 0
    for position, city_id in enumerate(planned):
        if city_id in city_ids:
            positions |= bitmap.member(position)
    return positions
