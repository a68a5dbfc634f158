"""The files in quarantine as the API shows them: which were refused, why, and where they lie."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import msgspec

from services.api.http.date_range import DateRange
from services.api.http.deadline import deadline
from services.api.unreadable import UnreadableObject, read_if_readable
from shared.domain import keys, objects
from shared.domain.objects import QuarantineReport
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore

READING_DEADLINE_S = 30.0
GETS_AT_ONCE_MAX = 16
RECORDS_SHOWN_MAX = 10


class BadRecordShown(msgspec.Struct, frozen=True, kw_only=True):
    """A record of a refused file that breaks a rule."""

    record_number: Annotated[int, msgspec.Meta(ge=1, description="From 1, in the order of the file.", examples=[3])]
    byte_offset: Annotated[
        int | None, msgspec.Meta(description="Where the record begins, in the file without content-encoding.")
    ]
    field: Annotated[str | None, msgspec.Meta(examples=["passengers"])]
    value: Annotated[str | None, msgspec.Meta(description="What is there, shortened.", examples=["-1"])]
    reason: Annotated[str, msgspec.Meta(examples=["Expected `int` >= 0"])]


class QuarantinedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was refused as a whole. The good revision before it, if there was one, still counts."""

    date: dt.date
    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[str, msgspec.Meta(examples=["Port Tina"])]
    country: Annotated[str, msgspec.Meta(examples=["armenia"])]
    reason: Annotated[str, msgspec.Meta(description="Why it was refused, in a sentence.")]
    records: Annotated[int | None, msgspec.Meta(description="How many records it has; null: it was not read so far.")]
    bad_records: Annotated[int, msgspec.Meta(ge=0, description="Records that break a rule, as far as it was read.")]
    reported: Annotated[
        tuple[BadRecordShown, ...],
        msgspec.Meta(description="The first ten of them; the report in the bucket names up to a hundred."),
    ]
    broke_off: Annotated[str | None, msgspec.Meta(description="Why not all of the file came; null: all of it did.")]
    key: Annotated[
        str,
        msgspec.Meta(
            description="The object of the bucket that holds the file.",
            examples=["raw/date=2024-05-01/city=7/4f2c1f0f9a6c4c0f8e0f3f8f6f0d2b11.json"],
        ),
    ]
    report_key: Annotated[str, msgspec.Meta(description="The object of the bucket that holds the report on it.")]
    sha256: Annotated[str, msgspec.Meta(description="Of the file, in hexadecimal.")]
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    upstream_url: str
    request_id: Annotated[str, msgspec.Meta(description="The request that brought it first.")]
    last_request_id: Annotated[str, msgspec.Meta(description="The request that brought the same bytes last.")]
    seen: Annotated[int, msgspec.Meta(ge=1, description="How many requests brought these bytes.")]
    quarantined_at: dt.datetime
    last_seen_at: dt.datetime


class QuarantineList(msgspec.Struct, frozen=True, kw_only=True):
    """Files in quarantine, by date and city."""

    total: Annotated[int, msgspec.Meta(ge=0, description="How many there are in the range, listed or not.")]
    files: tuple[QuarantinedFile, ...]
    unreadable: Annotated[
        tuple[UnreadableObject, ...], msgspec.Meta(description="Reports that are listed in total, and cannot be read.")
    ] = ()


async def list_quarantine(store: ObjectStore, days: DateRange, *, limit: int) -> QuarantineList:
    """Return the first files in quarantine of a range of dates, at most ``limit`` of them, and how many there are."""

    async def of_month(month: str) -> list[str]:
        return [
            listed.key
            async for listed in store.list(keys.quarantine_of_month(month))
            if listed.key.endswith(keys.REPORT_SUFFIX) and (keys.parse_date(listed.key) or dt.date.min) in days
        ]

    async def read(key: str) -> QuarantineReport | UnreadableObject | None:
        found = await store.get(key)
        return read_if_readable(lambda: objects.decode(QuarantineReport, found.body, key)) if found else None

    async with deadline(READING_DEADLINE_S, "Reading what is in quarantine"):
        months = await bounded_map(of_month, list(days.months()), limit=GETS_AT_ONCE_MAX)
        found = sorted(key for month in months for key in month)
        reports = await bounded_map(read, found[:limit], limit=GETS_AT_ONCE_MAX)
    return QuarantineList(
        total=len(found),
        files=tuple(_shown(report) for report in reports if isinstance(report, QuarantineReport)),
        unreadable=tuple(report for report in reports if isinstance(report, UnreadableObject)),
    )


def _shown(report: QuarantineReport) -> QuarantinedFile:
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
