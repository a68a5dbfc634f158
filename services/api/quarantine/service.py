"""Lists the files in quarantine, and retries their city-days.

The order of effects of a retry, for each request: the retry is recorded, then Kafka acknowledges it. A retry that is
recorded and not acknowledged is published by the requeue of stalled requests. Repeating the call is harmless.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from functools import partial
from typing import Annotated

import msgspec

from services.api.http.date_range import DateRange
from services.api.http.deadline import deadline
from services.api.http.errors import InvalidParameter, InvalidRequest, NotFound
from services.api.http.unreadable import UnreadableObject, get_if_readable
from shared.domain import bitmap, keys
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import QuarantineReport, RequestRecord
from shared.domain.requests import NOBODY, Caller, NothingToRetry, request_event
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import begin_retry, read_plan, read_request_record

READING_DEADLINE_S = 30.0
CONCURRENT_GETS_MAX = 16
RECORDS_SHOWN_MAX = 10
RETRIED_FILES_MAX = 1_000
"""The most files that one call retries."""
READ_MAX = 2_000
"""The most reports that one call reads. The country is in the report, not in its key, so each report must be read."""


class BadRecordShown(msgspec.Struct, frozen=True, kw_only=True):
    """A record of a refused file that breaks a rule."""

    record_number: Annotated[int, msgspec.Meta(ge=1, description="From 1, in the order of the file.", examples=[3])]
    byte_offset: Annotated[
        int | None, msgspec.Meta(description="Where the record begins, in the file without content-encoding.")
    ]
    field: Annotated[str | None, msgspec.Meta(examples=["passengers"])]
    value: Annotated[str | None, msgspec.Meta(description="The value in the file, shortened.", examples=["-1"])]
    reason: Annotated[str, msgspec.Meta(examples=["passengers is -1; it must be 0 or more"])]


class QuarantinedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was refused as a whole. The last good revision before it still counts, if there is one."""

    date: dt.date
    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[str, msgspec.Meta(examples=["Port Tina"])]
    country: Annotated[str, msgspec.Meta(examples=["armenia"])]
    reason: Annotated[str, msgspec.Meta(description="Why the file was refused, in a sentence.")]
    records: Annotated[
        int | None, msgspec.Meta(description="The number of records; null: reading stopped before the end.")
    ]
    bad_records: Annotated[int, msgspec.Meta(ge=0, description="Records that break a rule, in the part that was read.")]
    reported: Annotated[
        tuple[BadRecordShown, ...],
        msgspec.Meta(description="The first ten bad records; with `detail=full`, the first hundred."),
    ]
    broke_off: Annotated[
        str | None, msgspec.Meta(description="Why the download stopped early; null: the file is whole.")
    ]
    key: Annotated[
        str,
        msgspec.Meta(
            description="The object of the bucket that holds the file.",
            examples=["raw/date=2024-05-01/city=7/4f2c1f0f9a6c4c0f8e0f3f8f6f0d2b11.json"],
        ),
    ]
    report_key: Annotated[str, msgspec.Meta(description="The object of the bucket that holds its report.")]
    sha256: Annotated[str, msgspec.Meta(description="The SHA-256 of the file, in hexadecimal.")]
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    upstream_url: str
    etag: Annotated[str | None, msgspec.Meta(description="The `ETag` of the upstream's response.")]
    last_modified: Annotated[str | None, msgspec.Meta(description="The `Last-Modified` of the upstream's response.")]
    request_id: Annotated[str, msgspec.Meta(description="The first request that fetched these bytes.")]
    last_request_id: Annotated[str, msgspec.Meta(description="The latest request that fetched these bytes.")]
    seen: Annotated[int, msgspec.Meta(ge=1, description="The number of requests that fetched these bytes.")]
    quarantined_at: dt.datetime
    last_seen_at: dt.datetime


class QuarantineList(msgspec.Struct, frozen=True, kw_only=True):
    """Quarantined files, by date and city."""

    total: Annotated[int, msgspec.Meta(ge=0, description="The number of files in the range, listed or not.")]
    files: tuple[QuarantinedFile, ...]
    unreadable: Annotated[
        tuple[UnreadableObject, ...], msgspec.Meta(description="Reports that cannot be read; `total` counts them.")
    ] = ()


class RetriedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A city-day with a file in quarantine, and the request that last fetched this file."""

    date: dt.date
    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[str, msgspec.Meta(examples=["Port Tina"])]
    request_id: Annotated[str, msgspec.Meta(examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"])]


class QuarantineRetry(msgspec.Struct, frozen=True, kw_only=True):
    """The city-days that are retried, each in the request that last fetched its file."""

    retried: tuple[RetriedFile, ...]
    skipped: Annotated[
        tuple[RetriedFile, ...],
        msgspec.Meta(description="City-days that have not failed in this request, or whose request still runs."),
    ]
    unreadable: Annotated[tuple[UnreadableObject, ...], msgspec.Meta(description="Reports that cannot be read.")] = ()


class QuarantineFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Selects files by their dates, country and city; None selects all."""

    days: DateRange | None = None
    country: CountrySlug | None = None
    city_id: CityId | None = None

    def matches_key(self, key: str) -> bool:
        """Return whether the key is that of a report on a selected date and city."""
        date = keys.parse_date(key)
        return (
            key.endswith(keys.REPORT_SUFFIX)
            and date is not None
            and (self.days is None or date in self.days)
            and (self.city_id is None or f"/city={self.city_id}/" in key)
        )


class Quarantine:
    """The files in quarantine, of a bucket."""

    def __init__(self, store: ObjectStore, publisher: Publisher, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._publisher = publisher
        self._clock = clock

    async def find(self, wanted: QuarantineFilter, *, limit: int, detailed: bool = False) -> QuarantineList:
        """Return the first ``limit`` selected files by date and city, and the number of all.

        Raises InvalidRequest if a country is selected and more than READ_MAX reports of any country match the rest.
        """
        async with deadline(READING_DEADLINE_S, "Listing the quarantine"):
            found = await self._keys(wanted)
            reports = await self._read(found if wanted.country else found[:limit])
        readable = [one for one in reports if isinstance(one, QuarantineReport)]
        selected = [one for one in readable if wanted.country in {None, one.country}]
        unreadable = tuple(one for one in reports if isinstance(one, UnreadableObject))
        return QuarantineList(
            total=len(selected) + len(unreadable) if wanted.country else len(found),
            files=tuple(file_of(one, records_max=None if detailed else RECORDS_SHOWN_MAX) for one in selected[:limit]),
            unreadable=unreadable,
        )

    async def retry(self, wanted: QuarantineFilter, *, by: Caller = NOBODY) -> QuarantineRetry:
        """Retry the selected city-days, each as a failed city of the request that last fetched its file.

        Raises NotFound if no file is selected, and InvalidRequest if more than RETRIED_FILES_MAX are, or if more than
        READ_MAX reports would be read.
        """
        async with deadline(READING_DEADLINE_S, "Retrying the files in quarantine"):
            reports = await self._read(await self._keys(wanted))
            selected = [
                one for one in reports if isinstance(one, QuarantineReport) and wanted.country in {None, one.country}
            ]
            if len(selected) > RETRIED_FILES_MAX:
                reason = (
                    f"{len(selected):,} files match; one call retries at most {RETRIED_FILES_MAX:,}. Retry fewer dates"
                )
                raise InvalidRequest(InvalidParameter(name="to", reason=reason))
            if not selected:
                raise NotFound("There is no such file in quarantine. GET /quarantine lists them.")
            by_request: dict[RequestId, list[QuarantineReport]] = {}
            for report in selected:
                by_request.setdefault(report.last_request_id, []).append(report)
            retried: list[RetriedFile] = []
            skipped: list[RetriedFile] = []
            for request_id, its_reports in by_request.items():
                began = await self._retry_cities(request_id, {one.city_id for one in its_reports}, by)
                (retried if began else skipped).extend(map(_retried_file_of, its_reports))
        return QuarantineRetry(
            retried=tuple(retried),
            skipped=tuple(skipped),
            unreadable=tuple(one for one in reports if isinstance(one, UnreadableObject)),
        )

    async def _retry_cities(self, request_id: RequestId, city_ids: set[CityId], by: Caller) -> bool:
        """Retry cities of a request; return False if there is nothing to retry."""
        record = await read_request_record(self._store, request_id)
        if record is None:
            return False
        try:
            positions = await self._positions(record, city_ids)
            record = await begin_retry(self._store, request_id, self._clock(), positions=positions, by=by)
        except NothingToRetry:
            return False
        if record is None:
            return False
        await self._publisher.publish([OutgoingEvent(request_event(record))])
        return True

    async def _positions(self, record: RequestRecord, city_ids: set[CityId]) -> int | None:
        """Return the positions of cities in the plan of a request, as a bitmap; None, for all, if the plan changed."""
        plan = await read_plan(self._store, record.date)
        if plan is None or plan.revision != record.plan_revision:
            return None
        planned = (city.city_id for country in plan.countries.values() for city in country.cities)
        positions = 0
        for position, city_id in enumerate(planned):
            if city_id in city_ids:
                positions |= bitmap.member(position)
        return positions

    async def _keys(self, wanted: QuarantineFilter) -> list[str]:
        """Return the keys of the reports on the selected dates and city, by date and city."""
        days = wanted.days
        if days is None:
            prefixes = [keys.QUARANTINE]
        elif days.days == 1:
            prefixes = [keys.quarantine_of_date(days.first)]
        else:
            prefixes = [keys.quarantine_of_month(month) for month in days.months()]

        async def below(prefix: str) -> list[str]:
            return [one.key async for one in self._store.list(prefix) if wanted.matches_key(one.key)]

        return sorted(key for found in await bounded_map(below, prefixes, limit=CONCURRENT_GETS_MAX) for key in found)

    async def _read(self, found: list[str]) -> list[QuarantineReport | UnreadableObject | None]:
        if len(found) > READ_MAX:
            reason = f"{len(found):,} reports match; one call reads at most {READ_MAX:,}. Select fewer dates, or a city"
            raise InvalidRequest(InvalidParameter(name="from", reason=reason))
        read = partial(get_if_readable, self._store, QuarantineReport)
        return await bounded_map(read, found, limit=CONCURRENT_GETS_MAX)


def _retried_file_of(report: QuarantineReport) -> RetriedFile:
    return RetriedFile(
        date=report.date, city_id=report.city_id, city_name=report.city_name, request_id=report.last_request_id
    )


def file_of(report: QuarantineReport, *, records_max: int | None = RECORDS_SHOWN_MAX) -> QuarantinedFile:
    """Return the fields of a report that the API shows, with its first ``records_max`` bad records."""
    return QuarantinedFile(
        date=report.date,
        city_id=report.city_id,
        city_name=report.city_name,
        country=report.country,
        reason=report.reason,
        records=report.records,
        bad_records=report.bad_records,
        reported=tuple(
            BadRecordShown(
                record_number=one.record_number,
                byte_offset=one.byte_offset,
                field=one.field,
                value=one.value,
                reason=one.reason,
            )
            for one in report.reported[:records_max]
        ),
        broke_off=report.broke_off,
        key=report.key,
        report_key=report.report_key,
        sha256=report.sha256,
        size_bytes=report.size_bytes,
        upstream_url=report.upstream_url,
        etag=report.etag,
        last_modified=report.last_modified,
        request_id=report.request_id,
        last_request_id=report.last_request_id,
        seen=report.seen,
        quarantined_at=report.quarantined_at,
        last_seen_at=report.last_seen_at,
    )
