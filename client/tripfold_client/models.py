"""The responses of the API, as immutable objects. Fields that a newer API adds are ignored."""

from __future__ import annotations

import datetime as dt
import warnings
from collections.abc import Callable

import msgspec

COMPLETED = "completed"
_ENDS = frozenset({COMPLETED, "completed with failures", "failed", "cancelled"})
FAILURES_NAMED_MAX = 3


class CityCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a request. A city is done when it has failed, was skipped, or its numbers are served."""

    cities_total: int
    cities_done: int
    cities_failed: int
    cities_skipped: int
    cities_unchanged: int
    bytes_done: int
    trips_done: int


class CityFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A city that failed, and the reason. ``quarantine_key`` is the object of the bucket that holds a refused file."""

    city_id: str
    city_name: str
    reason: str
    quarantine_key: str | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request to process a date, and its progress. A listing leaves out the failures."""

    id: str
    date: dt.date
    status: str
    version: int
    requested_at: dt.datetime
    updated_at: dt.datetime
    counts: CityCounts
    failed_reason: str | None = None
    failures: tuple[CityFailure, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the request has reached its last status."""
        return self.status in _ENDS

    @property
    def progress(self) -> str:
        """The progress in one line."""
        counts = self.counts
        parts = [str(self.date), self.status, f"{counts.cities_done}/{counts.cities_total} cities"]
        parts += [f"{counts.cities_failed} failed"] if counts.cities_failed else []
        return ", ".join(parts)

    @property
    def failure(self) -> str:
        """Name the failures in one sentence. Empty if the request is completed."""
        if self.status == COMPLETED:
            return ""
        if self.failed_reason is not None:
            return f"{self.date} {self.status}: {self.failed_reason}"
        named = [f"{one.city_name or one.city_id} ({one.reason})" for one in self.failures]
        return _failure(f"{self.date} {self.status}", named, self.counts.cities_failed, ("city", "cities"))


class DateCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The dates of a backfill by their state."""

    dates_total: int
    dates_completed: int
    dates_failed: int
    dates_skipped: int
    dates_cancelled: int
    dates_under_way: int

    @property
    def dates_done(self) -> int:
        """The dates that have ended."""
        return self.dates_completed + self.dates_failed + self.dates_skipped + self.dates_cancelled


class BackfillDate(msgspec.Struct, frozen=True, kw_only=True):
    """A date of a backfill, and the id of its request."""

    date: dt.date
    request_id: str


class Backfill(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """A backfill of many dates, and its progress. A listing leaves out the dates under way and the failed dates."""

    id: str
    first: dt.date
    last: dt.date
    only: str
    order: str
    max_parallel: int
    source: str
    country: str | None
    city: str | None
    schedule: str | None
    status: str
    version: int
    created_at: dt.datetime
    updated_at: dt.datetime
    counts: DateCounts
    dates_per_hour: float | None
    estimated_end: dt.datetime | None
    under_way: tuple[BackfillDate, ...] = ()
    failed: tuple[BackfillDate, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the backfill has reached its last status, and no date of it is processed any more."""
        return self.status in _ENDS and not self.counts.dates_under_way

    @property
    def progress(self) -> str:
        """The progress in one line."""
        counts = self.counts
        parts = [f"{self.first}..{self.last}", self.status, f"{counts.dates_done}/{counts.dates_total} dates"]
        parts += [f"{counts.dates_failed} failed"] if counts.dates_failed else []
        parts += [f"until about {self.estimated_end:%Y-%m-%d %H:%M} UTC"] if self.estimated_end else []
        return ", ".join(parts)

    @property
    def read_nothing(self) -> bool:
        """Whether it should have read stored files, and no date has any."""
        return self.source == "bucket" and self.counts.dates_skipped == self.counts.dates_total

    @property
    def failure(self) -> str:
        """Name the failures in one sentence. Empty if the backfill is completed."""
        if self.read_nothing:
            limits = (("country", self.country), ("city", self.city))
            wanted = "".join(f" of {name} '{value}'" for name, value in limits if value is not None)
            return f"No file was read: no date from {self.first} to {self.last} has stored files{wanted}"
        if self.status == COMPLETED:
            return ""
        named = [str(one.date) for one in self.failed]
        return _failure(f"{self.first}..{self.last} {self.status}", named, self.counts.dates_failed, ("date", "dates"))


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """The dates that a backfill would process: their number, and the first hundred."""

    dates_total: int
    dates_selected: int
    dates: tuple[dt.date, ...]


class Run(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """A run of a schedule. ``status`` is None if its backfill cannot be read."""

    due: dt.datetime
    first: dt.date
    last: dt.date
    backfill_id: str
    status: str | None


class LateDate(msgspec.Struct, frozen=True, kw_only=True):
    """A date that is not complete after its deadline."""

    date: dt.date
    deadline: dt.datetime


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule, its next and last run, and its late dates. ``next_run`` is None while it is paused."""

    name: str
    cron: str
    timezone: str
    date: int
    recheck: int
    max_parallel: int
    complete_by: str | None
    paused: bool
    next_run: dt.datetime | None
    last_run: Run | None
    late: tuple[LateDate, ...]


class BadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record of a refused file that breaks a rule."""

    record_number: int
    byte_offset: int | None
    field: str | None
    value: str | None
    reason: str


class QuarantinedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was refused as a whole, and why. ``records`` is None if reading stopped before the end."""

    date: dt.date
    city_id: str
    city_name: str
    country: str
    reason: str
    records: int | None
    bad_records: int
    reported: tuple[BadRecord, ...]
    broke_off: str | None
    key: str
    report_key: str
    sha256: str
    size_bytes: int
    upstream_url: str
    etag: str | None
    last_modified: str | None
    request_id: str
    last_request_id: str
    seen: int
    quarantined_at: dt.datetime
    last_seen_at: dt.datetime


class UnreadableObject(msgspec.Struct, frozen=True, kw_only=True):
    """An object of the bucket that cannot be read, and why. The response lacks it."""

    key: str
    reason: str


Report = Callable[[UnreadableObject], object]
"""Is called with each object that a listing lacks because it cannot be read."""


class UnreadableWarning(UserWarning):
    """A listing lacks an object of the bucket that cannot be read."""


def warn_unreadable(unreadable: UnreadableObject) -> None:
    """Report an unreadable object as a warning."""
    warnings.warn(f"{unreadable.key}: {unreadable.reason}", UnreadableWarning, stacklevel=2)


class Quarantine(msgspec.Struct, frozen=True, kw_only=True):
    """Refused files by date and city, and reports that cannot be read. ``total`` counts those beyond the limit too."""

    total: int
    files: tuple[QuarantinedFile, ...]
    unreadable: tuple[UnreadableObject, ...] = ()


class RetriedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A city-day with a refused file, and the id of the request that last fetched this file."""

    date: dt.date
    city_id: str
    city_name: str
    request_id: str


class QuarantineRetry(msgspec.Struct, frozen=True, kw_only=True):
    """The city-days that are retried. Skipped ones have not failed in their request, or it still runs."""

    retried: tuple[RetriedFile, ...]
    skipped: tuple[RetriedFile, ...]
    unreadable: tuple[UnreadableObject, ...] = ()


def _failure(what: str, named: list[str], count: int, things: tuple[str, str]) -> str:
    if not count:
        return what
    shown = named[:FAILURES_NAMED_MAX]
    more = [f"{count - len(shown):,} more"] if count > len(shown) else []
    return f"{what}: {count:,} {things[count > 1]} failed: {', '.join(shown + more)}"
