"""The JSON objects in the bucket that several services use: typed structs with one canonical encoding."""

from __future__ import annotations

import datetime as dt
import enum
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from shared.domain import keys, schema
from shared.domain.contribution import NOTHING, Contribution, Totals, figure_beyond
from shared.domain.events import (
    BACKGROUND,
    Background,
    BadCity,
    CitiesField,
    Outcome,
    PositionField,
    PositionsField,
    ReasonField,
    Source,
)
from shared.domain.ids import (
    EXACT_MAX,
    REVISION_FLOOR_MAX,
    CityField,
    CityId,
    CountField,
    CountryField,
    InstantField,
    NameField,
    RequestField,
    RevisionField,
    SchemaVersionField,
)

HISTORY_LENGTH_MAX = 100
REMEDY = "Run 'tripfold repair' or restore the object from the bucket's versions, then retry this request"
"""What to do when an unreadable object has made a date or a city fail."""
DATE_OFFSET_MAX = 366
EPOCH = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)

_Stored = TypeVar("_Stored", bound="BucketObject")


class BucketObject(msgspec.Struct, frozen=True, kw_only=True):
    """The base of stored objects: the version of their schema.

    Fields are checked as strictly as those of the events that follow from them. Only the ids in a ledger and its plan
    are not: checking 10,000 of them would triple the time to decode a summary.
    """

    schema_version: SchemaVersionField = schema.FIRST_VERSION


class CorruptObject(RuntimeError):
    """The object under ``key`` cannot be read as a ``kind``."""

    def __init__(self, key: str, fault: str, kind: type[BucketObject] = BucketObject) -> None:
        super().__init__(f"{key} {fault}")
        self.key = key
        self.kind = kind

    @property
    def harms_alone(self) -> bool:
        """Whether only one date or one request needs the object, so that this one can fail and the others go on."""
        return keys.parse_date(self.key) is not None or self.key.startswith(keys.REQUESTS)


class NewerObject(CorruptObject):
    """A later version of Tripfold wrote the object. This build must not use or replace it."""

    @property
    def harms_alone(self) -> bool:
        """False: the process waits for its upgrade."""
        return False


class BucketEpoch(BucketObject, frozen=True, kw_only=True):
    """The epoch of the bucket. None of its revisions is lower than ``revision_floor``: seconds since 2020-01-01."""

    revision_floor: Annotated[int, msgspec.Meta(ge=0, le=REVISION_FLOOR_MAX)]
    born_at: InstantField


class SchemaSwitch(BucketObject, frozen=True, kw_only=True):
    """The switch of the schema version: every process writes the ``schema_version`` of this object."""


class Countries(BucketObject, frozen=True, kw_only=True):
    """The slug of every known country, by its name in NFC. A slug never changes."""

    slugs: dict[str, CountryField] = {}


class GenerationPointer(BucketObject, frozen=True, kw_only=True):
    """The live generation of summaries, and the one that the rebuild with ``token`` is building.

    ``highest`` is the highest number of any generation so far. Numbers are never reused. ``changes_counted_since`` is
    absent until every process that writes summaries counts their changes in `ChangeCounters`. A build that does not
    count them does not know the field either, so a pointer that it writes lacks it.
    """

    live: CountField = 1
    building: CountField | None = None
    token: str | None = None
    highest: CountField = 1
    changes_counted_since: InstantField | UnsetType = UNSET

    @property
    def folded(self) -> tuple[int, ...]:
        """The generations into which an aggregate folds, the live one first."""
        return (self.live,) if self.building is None else (self.live, self.building)


class ChangeCounters(BucketObject, frozen=True, kw_only=True):
    """How often one writer has changed summaries of a generation, by month. A counter only grows."""

    months: dict[str, CountField] = {}


class PlannedCity(msgspec.Struct, frozen=True, kw_only=True):
    """A city that a date expects. ``upstream_id`` is its id in the URLs of the upstream."""

    city_id: CityField
    upstream_id: str
    name: NameField


class PlannedCountry(msgspec.Struct, frozen=True, kw_only=True):
    """The cities of one country that a date expects, sorted by id."""

    name: NameField
    cities: tuple[PlannedCity, ...]


class Plan(BucketObject, frozen=True, kw_only=True):
    """The expected cities of a date by country. ``gone`` has the countries that only earlier plans had.

    ``write_intent`` names the planner's attempt that announced another list: a list that was requested before must not
    replace this plan.
    """

    date: dt.date
    revision: RevisionField
    request_id: RequestField
    planned_at: InstantField
    countries: dict[CountryField, PlannedCountry]
    gone: dict[CountryField, NameField] = {}
    bad_cities_count: CountField = 0
    bad_cities: tuple[BadCity, ...] = ()
    write_intent: str | UnsetType = UNSET


class PastRevision(msgspec.Struct, frozen=True, kw_only=True):
    """An earlier revision of a manifest, and the attempt that made it."""

    revision: RevisionField
    attempt: str
    raw_key: str
    country: CountryField
    request_id: RequestField
    ingested_at: InstantField


class Manifest(BucketObject, frozen=True, kw_only=True):
    """The current revision of a city-day: the authoritative record.

    ``retracted`` maps each country that the city has left to the revision of the retraction. ``history`` has the
    earlier revisions, the latest first, at most HISTORY_LENGTH_MAX. ``records_form`` says where the raw object has its
    records. ``bad_records`` counts the records that the contribution leaves out. If ``other_dates_are_bad``, these
    include the records that depart on another date. Raw objects that were stored before ``raw_expired_before`` have
    expired: they may be missing. ``suspicious`` says why the volume of the file is unusual. ``write_intent`` is the
    attempt that announced a new file: a file that was requested before must not replace this one.
    """

    date: dt.date
    city_id: CityField
    city_name: NameField
    country: CountryField
    country_name: NameField
    revision: RevisionField
    contribution: Contribution
    trips_on_other_dates: CountField
    attempt: str
    raw_key: str
    sha256: str
    size_bytes: CountField
    upstream_url: str
    etag: str | None
    last_modified: str | None
    plan_revision: CountField
    request_id: RequestField
    rule_version: CountField
    ingested_at: InstantField
    records_form: str = "array"
    bad_records: CountField = 0
    other_dates_are_bad: bool = False
    raw_expired_before: InstantField | None = None
    suspicious: ReasonField | None = None
    retracted: dict[CountryField, RevisionField] = {}
    history: tuple[PastRevision, ...] = ()
    write_intent: str | UnsetType = UNSET

    @property
    def raw_keys(self) -> frozenset[str]:
        """The raw objects that the manifest names, now or in its history."""
        return frozenset(self._raw_stored_at())

    @property
    def raw_expired(self) -> bool:
        """Whether the current raw object has expired."""
        return self.raw_key in self.expired_raw_keys()

    def expired_raw_keys(self, before: dt.datetime | None = None) -> frozenset[str]:
        """Return the named raw objects that have expired, by the mark of the manifest or a later ``before``."""
        marks = [mark for mark in (before, self.raw_expired_before) if mark is not None]
        return frozenset(key for key, stored_at in self._raw_stored_at().items() if marks and stored_at < max(marks))

    def _raw_stored_at(self) -> dict[str, dt.datetime]:
        """Return when each raw object was stored. Later revisions, such as moves, can name the same object."""
        oldest_last = [(self.raw_key, self.ingested_at), *((past.raw_key, past.ingested_at) for past in self.history)]
        return dict(oldest_last)

    def made_by(self, attempt: str) -> bool:
        """Return whether ``attempt`` made this revision or an earlier one: whether its compare-and-swap succeeded."""
        return attempt == self.attempt or any(past.attempt == attempt for past in self.history)


class ReportedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bad record of a refused file: its number from 1, its offset and the fault."""

    record_number: CountField
    byte_offset: CountField | None = None
    field: str | None = None
    value: str | None = None
    reason: str


class QuarantineReport(BucketObject, frozen=True, kw_only=True):
    """The reason for which a whole file was refused. ``key`` is the raw object with its bytes.

    ``reason`` is the sentence that the request shows. ``byte_offset``, ``record_number``, ``field`` and ``value``
    locate the fault that ended the parsing, or the first bad record; each may be None. ``bad_records`` counts the bad
    records up to the point where parsing ended, and ``reported`` has the first of them. ``broke_off`` says why the
    download was incomplete, or is None. A file that is refused again with the same bytes is not stored twice: ``seen``
    counts the refusals, and ``last_request_id`` is the latest request. gc marks a report ``expired`` before it deletes
    the report, and nobody renews it then.
    """

    date: dt.date
    city_id: CityField
    city_name: str
    country: CountryField
    country_name: str
    request_id: RequestField
    plan_revision: CountField
    attempt: str
    key: str
    upstream_url: str
    etag: str | None
    last_modified: str | None
    sha256: str
    size_bytes: CountField
    reason: str
    byte_offset: CountField | None = None
    record_number: CountField | None = None
    field: str | None = None
    value: str | None = None
    records: CountField | None = None
    bad_records: CountField = 0
    reported: tuple[ReportedRecord, ...] = ()
    broke_off: str | None = None
    rule_version: CountField
    quarantined_at: InstantField
    seen: CountField = 1
    last_seen_at: InstantField
    last_request_id: RequestField
    expired: bool = False

    @property
    def report_key(self) -> str:
        """The key of this report."""
        return keys.quarantine_report(self.date, self.city_id, self.attempt)


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The entry of one city in a summary: its contribution, or a tombstone after its retraction.

    ``country_name`` is empty in a tombstone, and in a summary with a plan in force.
    """

    revision: RevisionField
    city_name: str = ""
    contribution: Contribution | None = None
    trips_on_other_dates: CountField = 0
    sha256: str = ""
    ingested_at: InstantField | None = None
    suspicious: str = ""
    country_name: str = ""


class PlanChunks(msgspec.Struct, frozen=True, kw_only=True):
    """The expected cities of a country-day in one plan revision: the received chunks by number, out of ``chunks``."""

    revision: RevisionField
    chunks: CountField
    country_name: str = ""
    cities: dict[int, tuple[CityId, ...]]

    @property
    def whole(self) -> bool:
        """Whether every chunk has been received, so that the plan can take effect."""
        return len(self.cities) == self.chunks


class Summary(BucketObject, frozen=True, kw_only=True):
    """The summary of a country-day: its totals, then the plan, then the ledger of cities.

    The order of the fields is the order of the bytes, so a reader of totals fetches only the first few KiB.
    """

    date: dt.date
    country: CountryField
    country_name: str = ""
    version: CountField = 0
    totals: Totals = NOTHING
    has_data: bool = False
    cities_reported: CountField = 0
    cities_expected: CountField = 0
    complete: bool = False
    last_ingested_at: InstantField | None = None
    plan_revision: CountField = 0
    cities_suspicious: CountField | UnsetType = UNSET
    plans: tuple[PlanChunks, ...] = ()
    ledger: dict[CityId, LedgerEntry] = {}

    def has_content_of(self, other: Summary) -> bool:
        """Return whether both are equal, whichever schema version each was written in."""
        return self == msgspec.structs.replace(other, schema_version=self.schema_version)

    @property
    def expected_cities(self) -> frozenset[CityId]:
        """The cities that the current plan expects: the last of ``plans``, if all its chunks have been received."""
        if not self.plans or not self.plans[-1].whole:
            return frozenset()
        return frozenset(city for cities in self.plans[-1].cities.values() for city in cities)


class SummaryHead(BucketObject, frozen=True, kw_only=True, gc=False):
    """The first bytes of a Summary: everything but the plan and the ledger.

    A reader caches tens of thousands. None can be part of a reference cycle, so the garbage collector skips them.
    """

    date: dt.date
    country: CountryField
    country_name: str
    version: CountField
    totals: Totals
    has_data: bool
    cities_reported: CountField
    cities_expected: CountField
    complete: bool
    last_ingested_at: InstantField | None
    plan_revision: CountField
    cities_suspicious: CountField | UnsetType = UNSET


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A failed city-day, the reason, and the raw key of its file if it was refused.

    ``retried_at`` is the time of its latest retry. The request shows the later of two failures of a city.
    """

    city_id: CityField
    city_name: str
    reason: str
    quarantine_key: str | None = None
    retried_at: InstantField | None = None


class CityUnderWay(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A city-day of a request that has started and is not yet served.

    ``published`` and ``folded`` map countries to the highest revision published and folded.
    """

    bytes_done: CountField = 0
    bytes_total: CountField | None = None
    trips_done: CountField = 0
    published: dict[CountryField, CountField] = {}
    folded: dict[CountryField, CountField] = {}


class ActiveRequests(BucketObject, frozen=True, kw_only=True):
    """The request of a date that was started last, and the one that starts when it has ended.

    ``background`` is that of the waiting one until it has a record.
    """

    date: dt.date
    running: RequestField | None = None
    waiting: RequestField | None = None
    background: Background | UnsetType = UNSET


class RetriedCity(msgspec.Struct, frozen=True, kw_only=True):
    """A failed city that is retried."""

    city_id: CityField
    city_name: str


class RetryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The latest retry of a request.

    ``positions`` is a bitmap of the retried cities, over the plan of ``plan_revision``; 0 if the city list could not be
    read. ``count`` is the number of retries of the request, and ``cities`` has the first of the retried cities. A
    failure that is older than the retry does not end it.
    """

    count: CountField
    retried_at: InstantField
    plan_revision: CountField
    positions: PositionsField
    cities: tuple[RetriedCity, ...] = ()


class RequestAction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An action of a client on a request, backfill or schedule, for the audit.

    ``action`` is ``process``, ``cancel`` or ``retry`` of a request; ``make``, ``pause``, ``resume``, ``cancel`` or
    ``retry`` of a backfill; ``set``, ``pause``, ``resume`` or ``run`` of a schedule. ``key`` is the name of the API
    key, or empty. ``client`` is the address of the client. ``parameters`` are those of the HTTP request, like a query.
    """

    at: InstantField
    action: str
    key: str = ""
    client: str = ""
    parameters: str = ""
    result: str


class RequestRecord(BucketObject, frozen=True, kw_only=True):
    """The progress of one request: bitmaps in the order of the plan, and the city-days in progress.

    ``outcomes`` has a bitmap for each outcome. ``served`` is the bitmap of the cities whose revisions are all in the
    live generation. Bitmaps are hexadecimal integers; bit n stands for position n. ``version`` grows with every change.
    ``cancelled_at`` is the time of the cancellation, which skips cities that have not started. ``dispatched_at`` is
    the time of the latest ``ProcessRequested`` for which the planner has published every task. ``actions`` says who
    requested, cancelled and retried it: the first action, and the latest of the others. ``traceparent`` is the trace of
    the HTTP request that began it. ``background`` is absent unless a backfill made it and no client has joined it.
    """

    request_id: RequestField
    date: dt.date
    requested_at: InstantField
    updated_at: InstantField
    version: CountField = 1
    plan_revision: CountField = 0
    planned: bool = False
    cities: CitiesField = 0
    countries: CountField = 0
    bad_cities_count: CountField = 0
    bad_cities: tuple[BadCity, ...] = ()
    failed_reason: str | None = None
    outcomes: dict[Outcome, PositionsField] = {}
    served: PositionsField = "0"
    under_way: dict[PositionField, CityUnderWay] = {}
    bytes_done: CountField = 0
    trips_done: CountField = 0
    failures: dict[PositionField, Failure] = {}
    resent_at: InstantField | None = None
    cancelled_at: InstantField | None = None
    dispatched_at: InstantField | None = None
    retry: RetryRecord | None = None
    actions: tuple[RequestAction, ...] = ()
    traceparent: str | None = None
    background: Background | UnsetType = UNSET


class DateSelection(enum.Enum):
    """The dates of a backfill that are processed.

    Missing: without the data of every expected city, because the date was never processed or a city failed. Failed:
    processed, and without the data of a city. Stored: processed. All: every date.
    """

    MISSING = "missing"
    FAILED = "failed"
    STORED = "stored"
    ALL = "all"


class BackfillStatus(enum.Enum):
    """The status of a backfill. The last three are final; a retry makes a backfill with failures run again."""

    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    COMPLETED_WITH_FAILURES = "completed with failures"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether no further date is requested."""
        return self not in {BackfillStatus.RUNNING, BackfillStatus.PAUSED}


class Backfill(BucketObject, frozen=True, kw_only=True):
    """The dates from ``first`` to ``last``, and the progress of their requests. Any planner advances it.

    A date is named by its position in the order of processing. ``cursor`` is the next position that was not looked at.
    ``under_way`` has the positions that are requested now, and which retry of their request is awaited (0: none).
    ``completed``, ``failed``, ``skipped``, ``cancelled`` and ``to_retry`` are bitmaps of positions in hexadecimal
    digits. A skipped date was not in ``selection``, and the request of a cancelled one was cancelled. ``counted`` dates
    have ended since ``counted_from``, which gives the throughput. ``schedule`` is the name of the schedule that made
    it. ``actions`` says who made and changed it.
    """

    backfill_id: RequestField
    first: dt.date
    last: dt.date
    selection: DateSelection
    newest_first: bool = False
    max_parallel: CountField
    schedule: str | None = None
    created_at: InstantField
    updated_at: InstantField
    version: CountField = 1
    status: BackfillStatus = BackfillStatus.RUNNING
    cursor: CountField = 0
    under_way: dict[PositionField, CountField] = {}
    completed: PositionsField = "0"
    failed: PositionsField = "0"
    skipped: PositionsField = "0"
    cancelled: PositionsField = "0"
    to_retry: PositionsField = "0"
    counted_from: InstantField
    counted: CountField = 0
    actions: tuple[RequestAction, ...] = ()
    background: Background = BACKGROUND

    @property
    def source(self) -> Source:
        """Where its requests read the files."""
        return self.background.source


class OpenBackfills(BucketObject, frozen=True, kw_only=True):
    """The ids of the backfills that may have work left, oldest first.

    ``additions`` grows each time that one is named, also if it is named already.
    """

    backfill_ids: tuple[RequestField, ...] = ()
    additions: CountField = 0


class ScheduledRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a schedule: a backfill of the dates from ``first`` to ``last``.

    It is due at ``due``, and was claimed at ``claimed_at``. ``started`` says that its backfill was made.
    """

    due: InstantField
    backfill_id: RequestField
    first: dt.date
    last: dt.date
    claimed_at: InstantField
    started: bool = False


class Deadline(msgspec.Struct, frozen=True, kw_only=True):
    """A date of a schedule that has to be complete ``at`` a time. ``late``: it was found incomplete after it."""

    date: dt.date
    at: InstantField
    late: bool = False


class Schedule(BucketObject, frozen=True, kw_only=True):
    """Runs at the times of a cron line in a time zone. Any planner claims a run by compare-and-swap.

    A run processes the date that is ``date_offset`` days from the day on which it is due, and the ``recheck`` days
    before it. Times up to ``since`` are not run. ``run`` is the latest run. ``deadlines`` are those of the dates that
    were not found complete yet, if there is a ``complete_by``. ``actions`` says who made and changed it.
    """

    name: str
    cron: str
    timezone: str
    date_offset: Annotated[int, msgspec.Meta(ge=-DATE_OFFSET_MAX, le=DATE_OFFSET_MAX)] = -1
    recheck: CountField = 0
    max_parallel: CountField
    complete_by: dt.time | None = None
    paused: bool = False
    created_at: InstantField
    updated_at: InstantField
    since: InstantField
    version: CountField = 1
    run: ScheduledRun | None = None
    deadlines: tuple[Deadline, ...] = ()
    actions: tuple[RequestAction, ...] = ()


_PLANS_MARK = b',"plans":'
_encoder = msgspec.json.Encoder()  # msgspec cannot sort maps with integer or enum keys
_decoders: dict[type[BucketObject], msgspec.json.Decoder[BucketObject]] = {}
_version_decoder = msgspec.json.Decoder(BucketObject)


def encode(stored: BucketObject) -> bytes:
    """Encode a stored object under the schema version that is written now, or a later one that it already has.

    Its creator sorts its maps, so equal objects have equal bytes.
    """
    return _encoder.encode(schema.stamped(stored))


def decode(kind: type[_Stored], body: bytes, key: str) -> _Stored:
    """Decode a stored object of ``kind``. Errors name its ``key``.

    Raises CorruptObject if the body cannot be decoded or belongs to another key, and NewerObject for a later schema
    version.
    """
    decoder = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    try:
        stored = decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        _refuse_newer(body, key)
        raise CorruptObject(key, f"is not a readable {kind.__name__}: {error}", kind) from error
    if stored.schema_version > schema.SCHEMA_VERSION:
        _refuse_newer(body, key)
    _require_own_key(stored, key)
    return stored  # type: ignore[return-value]  # the decoder of this kind made it


def _refuse_newer(body: bytes, key: str) -> None:
    try:
        version = _version_decoder.decode(body).schema_version
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return
    if version > schema.SCHEMA_VERSION:
        raise NewerObject(key, f"has schema version {version}; this build knows {schema.SCHEMA_VERSION}: upgrade it")


def _require_own_key(stored: BucketObject, key: str) -> None:
    match stored:
        case Manifest():
            own = keys.manifest(stored.date, stored.city_id)
            misplaced = key.startswith(keys.MANIFESTS) and key != own
        case Plan():
            own = keys.plan(stored.date)
            misplaced = key.startswith(keys.PLANS) and key != own
        case ActiveRequests():
            own = keys.active_requests(stored.date)
            misplaced = key.startswith(keys.ACTIVE_REQUESTS) and key != own
        case Backfill():
            own = keys.backfill(stored.backfill_id)
            misplaced = key.startswith(keys.BACKFILLS) and key != own
        case Schedule():
            own = keys.schedule(stored.name)
            misplaced = key.startswith(keys.SCHEDULES) and key != own
        case Summary() | SummaryHead():
            own = f"{stored.date}/{stored.country}"
            misplaced = key.startswith(keys.SUMMARIES) and keys.parse_summary(key) != (stored.date, stored.country)
        case _:
            return
    if misplaced:
        raise CorruptObject(key, f"holds the content of {own}", type(stored))


def require_exact(summary: Summary | SummaryHead, key: str) -> None:
    """Raise CorruptObject for totals that a reader of JSON may round. Only files that mean harm add up to them."""
    name = figure_beyond(summary.totals, EXACT_MAX)
    if name is not None:
        raise CorruptObject(key, f"has {getattr(summary.totals, name)} as {name}; at most {EXACT_MAX} can be served")


def decode_head(first_bytes: bytes, key: str) -> SummaryHead:
    """Decode the totals of a summary from its first bytes, without the plan and the ledger.

    JSON escapes quotes in strings, so the name of the next field cannot occur inside a value. Raises like `decode` and
    `require_exact`.
    """
    end = first_bytes.find(_PLANS_MARK)
    if end < 0:
        raise CorruptObject(
            key, f"does not begin like a summary: its first {len(first_bytes)} bytes have no field 'plans'"
        )
    head = decode(SummaryHead, first_bytes[:end] + b"}", key)
    require_exact(head, key)
    return head
