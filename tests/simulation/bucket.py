"""The bucket of a simulation. Each write is checked against what was written, requested and served before."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET

from shared.domain import bitmap, keys, objects
from shared.domain.events import Outcome
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import ChangeCounters, GenerationPointer, Manifest, Plan, RequestRecord, Summary
from shared.domain.requests import Status, status_of
from tests.fakes.store import MemoryStore

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

UPLOAD_PART_BYTES = 64
COMPLETED = {Status.COMPLETED, Status.COMPLETED_WITH_FAILURES}


class CheckedBucket(MemoryStore):
    """A bucket that reports each write which breaks a promise.

    - A raw object is there before its manifest. Revisions and versions grow. Totals follow from their ledger.
    - When a request completes, each of its cities is served, from a file that the upstream had after the request. The
      change index has counted the summary, so no reader keeps an older one.
    - From then on, no manifest has an older file or country.
    """

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation.clock, part_bytes=UPLOAD_PART_BYTES)
        self.accepted_at_s: dict[RequestId, float] = {}
        self._simulation = simulation
        self._upstream = simulation.upstream
        self._complain = simulation.complain
        self._plans: dict[tuple[dt.date, int], list[tuple[CityId, CountrySlug]]] = {}
        self._counted: dict[str, bytes] = {}
        self._completed: dict[RequestId, int] = {}
        self._fresh_since_s: dict[tuple[dt.date, CityId], float] = {}

    def write(self, key: str, body: bytes) -> str:
        self._simulation.changed_at_s = self._simulation.loop.now_s
        before = self.objects.get(key)
        before_body = before.body if before else None
        if key.startswith(keys.MANIFESTS):
            self._check_manifest(key, body, before_body)
        elif key.startswith(keys.PLANS):
            plan = objects.decode(Plan, body, key)
            self._plans[plan.date, plan.revision] = [
                (city.city_id, country) for country, planned in plan.countries.items() for city in planned.cities
            ]
            self._check_grows(key, plan.revision, before_body and objects.decode(Plan, before_body, key).revision)
        elif key.startswith(keys.SUMMARIES):
            self._check_summary(key, body, before_body)
        written = super().write(key, body)
        if key.startswith(keys.CHANGES):
            self._note_counted(key, body, before_body)
        if key.startswith(keys.REQUESTS):
            self._check_request(objects.decode(RequestRecord, body, key))
        return written

    def live_summary(self, date: dt.date, country: CountrySlug) -> Summary | None:
        """Return a live summary."""
        pointer = objects.decode(GenerationPointer, self.objects[keys.CURRENT].body, keys.CURRENT)
        key = keys.summary(pointer.live, date, country)
        return objects.decode(Summary, self.objects[key].body, key) if key in self.objects else None

    def _note_counted(self, key: str, body: bytes, before_body: bytes | None) -> None:
        """Note the summaries of each month whose counter grows: readers list these again."""
        after = objects.decode(ChangeCounters, body, key).months
        before = objects.decode(ChangeCounters, before_body, key).months if before_body else {}
        for summary, stored in self.bodies(keys.SUMMARIES).items():
            date = keys.parse_date(summary)
            if date is not None and after.get(keys.month_of(date), 0) > before.get(keys.month_of(date), 0):
                self._counted[summary] = stored

    def _summary_for_readers(self, date: dt.date, country: CountrySlug) -> Summary | None:
        """Return the live summary that every reader of the change index finds."""
        pointer = objects.decode(GenerationPointer, self.objects[keys.CURRENT].body, keys.CURRENT)
        key = keys.summary(pointer.live, date, country)
        return objects.decode(Summary, self._counted[key], key) if key in self._counted else None

    def _check_grows(self, key: str, number: int, before: int | bytes | None) -> None:
        if isinstance(before, int) and number < before:
            self._complain(f"{key} went from {before} back to {number}")

    def _check_manifest(self, key: str, body: bytes, before_body: bytes | None) -> None:
        manifest = _settled(objects.decode(Manifest, body, key))
        before = None if before_body is None else _settled(objects.decode(Manifest, before_body, key))
        if manifest == before:
            return
        if before is not None and manifest.revision <= before.revision:
            self._complain(f"{key}: revision {manifest.revision} after {before.revision}")
        if manifest.raw_key not in self.objects:
            self._complain(f"{key} was written before {manifest.raw_key}")
        since_s = self._fresh_since_s.get((manifest.date, manifest.city_id), 0.0)
        if manifest.contribution not in self._upstream.contributions_since(
            int(manifest.city_id), manifest.date, since_s
        ):
            self._complain(f"{key}: {manifest.contribution} was withdrawn before a completed request")
        if manifest.country not in self._upstream.countries_since(int(manifest.city_id), since_s):
            self._complain(f"{key}: {manifest.country} was withdrawn before a completed request")

    def _check_summary(self, key: str, body: bytes, before_body: bytes | None) -> None:
        summary = objects.decode(Summary, body, key)
        if before_body is not None:
            self._check_grows(key, summary.version, objects.decode(Summary, before_body, key).version)
        counted = [entry.contribution for entry in summary.ledger.values() if entry.contribution is not None]
        sums = [sum(column) for column in zip(*map(msgspec.structs.astuple, counted), strict=True)]
        if list(msgspec.structs.astuple(summary.totals)) != (sums or [0, 0, 0, 0]):
            self._complain(f"{key}: its totals do not follow from its ledger")

    def _check_request(self, record: RequestRecord) -> None:
        accepted_s = self.accepted_at_s.get(record.request_id)
        if status_of(record) not in COMPLETED or accepted_s is None or record.background is not UNSET:
            return
        if self._completed.get(record.request_id) == record.plan_revision:
            return
        self._completed[record.request_id] = record.plan_revision
        failed = bitmap.decode(record.outcomes.get(Outcome.FAILED, "0"))
        for position, (city, country) in enumerate(self._plans[record.date, record.plan_revision]):
            if bitmap.contains(failed, position):
                continue
            summary = self._summary_for_readers(record.date, country)
            entry = summary.ledger.get(city) if summary else None
            found = self._upstream.contributions_since(int(city), record.date, accepted_s)
            if entry is None or (entry.contribution is not None and entry.contribution not in found):
                self._complain(f"{record.request_id} is completed; city {city} of {country} is served with {entry}")
            place = record.date, city
            self._fresh_since_s[place] = max(self._fresh_since_s.get(place, 0.0), accepted_s)


def _settled(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, write_intent=UNSET)
