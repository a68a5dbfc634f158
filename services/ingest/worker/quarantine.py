"""Quarantines an invalid file: keeps its bytes as a raw object, and writes a report under ``quarantine/``.

The order of effects, after the upload of the raw object has received the whole file:

1. read the reports on the city-day. If one of them is on the same bytes, renew that report, and stop. gc may delete a
   report that it has marked as expired, so nobody renews such a report;
2. complete the upload, so that the bytes are stored under the raw key of this attempt;
3. put the report, which names the raw key. From now on the file is quarantined.

After a crash before 3 Kafka redelivers the task, and another attempt takes all steps again. No manifest and no report
names the raw object of the crashed attempt, so gc deletes it. Only step 1 writes a key twice, by compare-and-swap.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import msgspec

from services.ingest.parsing.parser import InvalidTripFile, TooManyBadRecords
from services.ingest.parsing.trips import rule_version
from services.ingest.upstream.port import Validators
from services.ingest.worker.streaming import FileRefused
from services.ingest.worker.volume_check import SuspiciousFile
from shared.domain import keys, objects
from shared.domain.events import IngestCity
from shared.domain.ids import CityId
from shared.domain.objects import QuarantineReport, ReportedRecord
from shared.runtime import metrics
from shared.storage.object_store import CasConflict, ObjectStore, Upload
from shared.storage.repository import Repository, Versioned

REPORTS_COMPARED_MAX = 50
"""The number of reports on a city-day, from the latest, that are compared with a refused file."""


class FileSource(msgspec.Struct, frozen=True, kw_only=True):
    """The origin of a refused file: its URL and validators, and the attempt and raw key of its upload."""

    url: str
    validators: Validators
    attempt: str
    raw_key: str


class Quarantine:
    """Stores refused files. Workers can run in parallel, even on one city-day."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._repository = Repository(store)
        self._clock = clock

    async def keep(
        self, refused: FileRefused, task: IngestCity, source: FileSource, upload: Upload
    ) -> QuarantineReport:
        """Store a file and its report, or return the report on the same bytes.

        Completes the upload of new bytes; otherwise the caller aborts it.
        """
        match refused.fault:
            case SuspiciousFile():
                why = "suspicious"
            case InvalidTripFile():
                why = "invalid"
            case _:
                why = "parser_crash"
        metrics.quarantined_files.labels(why).inc()
        known = await self._seen_again(task, refused.sha256)
        if known is not None:
            return known
        report = report_on(refused, task, source, self._clock())
        await upload.complete()
        await self._store.put(report.report_key, objects.encode(report))
        return report

    async def _seen_again(self, task: IngestCity, sha256: str) -> QuarantineReport | None:
        """Renew the report on the same bytes, and count each request that received them. Return None without one.

        A retry of the request renews it too: the report and the bytes are kept for a time after the last refusal.
        """
        while True:
            found = await self._find(task.date, task.city_id, sha256)
            if found is None:
                return None
            report = found.value
            seen = report.seen + (report.last_request_id != task.request_id)
            again = msgspec.structs.replace(
                report, seen=seen, last_seen_at=self._clock(), last_request_id=task.request_id
            )
            try:
                await self._repository.compare_and_swap(report.report_key, again, over=found)
            except CasConflict:
                continue  # another request renewed it, or gc has just marked or deleted it
            return again

    async def _find(self, date: dt.date, city_id: CityId, sha256: str) -> Versioned[QuarantineReport] | None:
        reports = [
            listed
            async for listed in self._store.list(keys.quarantine_of(date, city_id))
            if listed.key.endswith(keys.REPORT_SUFFIX)
        ]
        latest_first = sorted(reports, key=lambda listed: listed.last_modified, reverse=True)
        for listed in latest_first[:REPORTS_COMPARED_MAX]:
            found = await self._repository.read(QuarantineReport, listed.key)
            if found is not None and found.value.sha256 == sha256 and not found.value.expired:
                return found
        return None


def report_on(refused: FileRefused, task: IngestCity, source: FileSource, now: dt.datetime) -> QuarantineReport:
    """Return the report on a refused file: its fault, its origin and its raw key."""
    fault = refused.fault
    invalid = fault if isinstance(fault, InvalidTripFile) else None
    return QuarantineReport(
        date=task.date,
        city_id=task.city_id,
        city_name=task.city_name,
        country=task.country,
        country_name=task.country_name,
        request_id=task.request_id,
        plan_revision=task.plan_revision,
        attempt=source.attempt,
        key=source.raw_key,
        upstream_url=source.url,
        etag=source.validators.etag,
        last_modified=source.validators.last_modified,
        sha256=refused.sha256,
        size_bytes=refused.size_bytes,
        reason=str(fault)[:2_000],
        byte_offset=invalid.byte_offset if invalid else None,
        record_number=invalid.record_number if invalid else None,
        field=invalid.field if invalid else None,
        value=invalid.value if invalid else None,
        records=invalid.records if isinstance(invalid, TooManyBadRecords) else None,
        bad_records=invalid.bad_records if invalid else 0,
        reported=tuple(ReportedRecord(**msgspec.structs.asdict(one)) for one in invalid.reported) if invalid else (),
        broke_off=None if refused.broke_off is None else str(refused.broke_off)[:1_000],
        rule_version=rule_version(),
        quarantined_at=now,
        last_seen_at=now,
        last_request_id=task.request_id,
    )
