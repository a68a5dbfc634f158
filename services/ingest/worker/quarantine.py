"""Refusing a file: its bytes stay in their raw object, and a report under ``quarantine/`` says what is wrong.

The order of effects, after all of the file has passed into its raw object's upload:

1. the reports on the city-day: the same bytes are there already → note in their report that they came again, and stop;
2. complete the upload, so that the bytes lie under the raw key of this attempt;
3. put the report, which names the raw key and makes the file count as quarantined.

A crash before 3 leaves a task that comes again and does it all under another attempt. The dead one's raw object, which
neither a manifest nor a report names, is left to the clean-up. No key is written twice, but for the note of 1, which is
swapped.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import msgspec

from services.ingest.parsing.parser import InvalidTripFile, TooManyBadRecords
from services.ingest.parsing.trips import RULE_VERSION
from services.ingest.upstream.client import Validators
from services.ingest.worker.streaming import FileRefused
from shared.domain import keys, objects
from shared.domain.events import IngestCity
from shared.domain.ids import CityId
from shared.domain.objects import QuarantineReport, ReportedRecord
from shared.runtime import metrics
from shared.storage.object_store import CasConflict, ObjectStore, Upload

REPORTS_COMPARED_MAX = 50
"""So many reports on a city-day, the latest, are looked through for the same bytes."""


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    """A refused file as it came: from where, and as which attempt's raw object it is being uploaded."""

    url: str
    validators: Validators
    attempt: str
    raw_key: str


class Quarantine:
    """Takes refused files in. Any number can do so side by side, also of one city-day."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._clock = clock

    async def keep(self, refused: FileRefused, task: IngestCity, arrived: Arrived, upload: Upload) -> QuarantineReport:
        """Keep a file and the report on it, or find them kept. The upload is completed, or left to be aborted."""
        why = "invalid" if isinstance(refused.fault, InvalidTripFile) else "parser_crash"
        metrics.quarantined_files.labels(why).inc()
        known = await self._seen_again(task, refused.sha256)
        if known is not None:
            return known
        report = report_on(refused, task, arrived, self._clock())
        await upload.complete()
        await self._store.put(report.report_key, objects.encode(report))
        return report

    async def _seen_again(self, task: IngestCity, sha256: str) -> QuarantineReport | None:
        """Find the report on the same bytes, and note that this request saw them too."""
        while True:
            found = await self._find(task.date, task.city_id, sha256)
            if found is None:
                return None
            report, etag = found
            if report.last_request_id == task.request_id:
                return report
            again = msgspec.structs.replace(
                report, seen=report.seen + 1, last_seen_at=self._clock(), last_request_id=task.request_id
            )
            try:
                await self._store.compare_and_swap(report.report_key, objects.encode(again), etag=etag)
            except CasConflict:
                continue  # another request saw it, or the clean-up has just deleted it
            return again

    async def _find(self, date: dt.date, city_id: CityId, sha256: str) -> tuple[QuarantineReport, str] | None:
        reports = [
            listed
            async for listed in self._store.list(keys.quarantine_of(date, city_id))
            if listed.key.endswith(keys.REPORT_SUFFIX)
        ]
        latest_first = sorted(reports, key=lambda listed: listed.last_modified, reverse=True)
        for listed in latest_first[:REPORTS_COMPARED_MAX]:
            found = await self._store.get(listed.key)
            report = objects.decode(QuarantineReport, found.body, listed.key) if found else None
            if found is not None and report is not None and report.sha256 == sha256:
                return report, found.etag
        return None


def report_on(refused: FileRefused, task: IngestCity, arrived: Arrived, now: dt.datetime) -> QuarantineReport:
    """Write down what is wrong with a file, and where it lies."""
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
        attempt=arrived.attempt,
        key=arrived.raw_key,
        upstream_url=arrived.url,
        etag=arrived.validators.etag,
        last_modified=arrived.validators.last_modified,
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
        rule_version=RULE_VERSION,
        quarantined_at=now,
        last_seen_at=now,
        last_request_id=task.request_id,
    )
