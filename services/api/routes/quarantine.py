"""The HTTP operation that lists quarantined files: which files were refused, why, and where they are stored."""

from __future__ import annotations

import datetime as dt
from functools import partial
from typing import Annotated, Protocol

import msgspec
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi.spec import Example
from litestar.params import QueryParameter, SkipValidation

from services.api.http.date_range import DateRange, DaysMax, date_range
from services.api.http.deadline import deadline
from services.api.http.problems import responses
from services.api.http.query_parameters import date_parameter
from services.api.http.unreadable import UnreadableObject, get_if_readable, unreadable_header
from shared.domain import keys
from shared.domain.objects import QuarantineReport
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore

READING_DEADLINE_S = 30.0
CONCURRENT_GETS_MAX = 16
RECORDS_SHOWN_MAX = 10
LISTED_FILES_MAX = 1_000


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
        msgspec.Meta(description="The first ten bad records; the report in the bucket has up to 100."),
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


class ReadQuarantine(Protocol):
    """Lists the quarantined files of a range of dates."""

    async def __call__(self, days: DateRange, *, limit: int) -> QuarantineList:
        """Return the first ``limit`` files, and the number of all."""


QuarantinePort = NamedDependency[SkipValidation[ReadQuarantine]]


@get(
    "/quarantine",
    summary="List the files that were refused",
    operation_id="listQuarantine",
    tags=["quarantine"],
    response_description="The quarantined files, by date and city.",
    responses=responses(),
)
async def files_in_quarantine(
    *,
    quarantine: QuarantinePort,
    days_max: NamedDependency[SkipValidation[DaysMax]],
    from_: Annotated[dt.date, date_parameter("from", "The first day.", "2024-05-01")],
    to: Annotated[dt.date, date_parameter("to", "The last day, included.", "2024-05-31")],
    limit: Annotated[
        int,
        QueryParameter(
            description="The maximum number of files to list.",
            ge=1,
            le=LISTED_FILES_MAX,
            examples=[Example(value=100)],
        ),
    ] = 100,
) -> Response[QuarantineList]:
    """Return the files that were refused as a whole, each with the reason and its first bad records.

    A file stays listed after it is corrected upstream, until `tripfold gc` deletes it. The ledger shows what counts.
    """
    listed = await quarantine(date_range(from_, to, days_max=days_max), limit=limit)
    return Response(listed, headers=unreadable_header(listed.unreadable))


async def list_quarantine(store: ObjectStore, days: DateRange, *, limit: int) -> QuarantineList:
    """Return the first ``limit`` quarantined files of a range of dates, and the number of all."""

    async def of_month(month: str) -> list[str]:
        return [
            listed.key
            async for listed in store.list(keys.quarantine_of_month(month))
            if listed.key.endswith(keys.REPORT_SUFFIX) and (keys.parse_date(listed.key) or dt.date.min) in days
        ]

    async with deadline(READING_DEADLINE_S, "Listing the quarantine"):
        months = await bounded_map(of_month, list(days.months()), limit=CONCURRENT_GETS_MAX)
        found = sorted(key for month in months for key in month)
        read = partial(get_if_readable, store, QuarantineReport)
        reports = await bounded_map(read, found[:limit], limit=CONCURRENT_GETS_MAX)
    return QuarantineList(
        total=len(found),
        files=tuple(_file_of(report) for report in reports if isinstance(report, QuarantineReport)),
        unreadable=tuple(report for report in reports if isinstance(report, UnreadableObject)),
    )


def _file_of(report: QuarantineReport) -> QuarantinedFile:
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
            for one in report.reported[:RECORDS_SHOWN_MAX]
        ),
        broke_off=report.broke_off,
        key=report.key,
        report_key=report.report_key,
        sha256=report.sha256,
        size_bytes=report.size_bytes,
        upstream_url=report.upstream_url,
        request_id=report.request_id,
        last_request_id=report.last_request_id,
        seen=report.seen,
        quarantined_at=report.quarantined_at,
        last_seen_at=report.last_seen_at,
    )


HANDLERS = [files_in_quarantine]
