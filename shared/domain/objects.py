"""Every small JSON object of the bucket that two services need, as typed structs with one canonical encoding."""

from __future__ import annotations

import datetime as dt
from typing import TypeVar

import msgspec

from shared.domain import keys
from shared.domain.contribution import NOTHING, Contribution
from shared.domain.events import BadCity, Outcome
from shared.domain.ids import CityId, CountrySlug, RequestId

SCHEMA_VERSION = 1
HISTORY_LENGTH_MAX = 100
EPOCH = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)

_Stored = TypeVar("_Stored", bound="BucketObject")


class BucketObject(msgspec.Struct, frozen=True, kw_only=True):
    """What all stored objects have: the version of the layout they were written under."""

    schema_version: int = SCHEMA_VERSION


class CorruptObject(RuntimeError):
    """An object of the bucket that cannot be read: nothing may be built on it. ``key`` is the object's."""

    def __init__(self, key: str, fault: str) -> None:
        super().__init__(f"{key} {fault}")
        self.key = key


class NewerObject(CorruptObject):
    """An object that a later version wrote: this build must neither use nor replace it."""


class BucketEpoch(BucketObject, frozen=True, kw_only=True):
    """The bucket's birth. No revision of this bucket is lower than ``revision_floor``: seconds since 2020-01-01."""

    revision_floor: int = msgspec.field(name="base")
    born_at: dt.datetime


class Countries(BucketObject, frozen=True, kw_only=True):
    """The slug of every country ever seen, by its name in NFC. A slug is minted once and never changes."""

    slugs: dict[str, CountrySlug] = {}


class GenerationPointer(BucketObject, frozen=True, kw_only=True):
    """Which generation of summaries is live, and which one is being built, by whose token.

    ``highest`` is the highest number ever given out: generations are never reused.
    """

    live: int = 1
    building: int | None = None
    token: str | None = None
    highest: int = 1

    @property
    def folded(self) -> tuple[int, ...]:
        """The generations that an aggregate folds into: live first."""
        return (self.live,) if self.building is None else (self.live, self.building)


class PlannedCity(msgspec.Struct, frozen=True, kw_only=True):
    """A city a date expects. ``upstream_id`` is its id as the upstream writes it, for the URL."""

    city_id: CityId
    upstream_id: str
    name: str


class PlannedCountry(msgspec.Struct, frozen=True, kw_only=True):
    """The cities of one country that a date expects, sorted by id."""

    name: str
    cities: tuple[PlannedCity, ...]


class Plan(BucketObject, frozen=True, kw_only=True):
    """Which cities, by country, a date expects. ``gone`` names the countries of earlier plans that have none left."""

    date: dt.date
    revision: int
    request_id: RequestId
    planned_at: dt.datetime
    countries: dict[CountrySlug, PlannedCountry]
    gone: dict[CountrySlug, str] = {}
    bad_cities_count: int = 0
    bad_cities: tuple[BadCity, ...] = ()


class PastRevision(msgspec.Struct, frozen=True, kw_only=True):
    """A revision that a manifest named before, and the attempt that made it."""

    revision: int
    attempt: str
    raw_key: str
    country: CountrySlug
    request_id: RequestId
    ingested_at: dt.datetime


class Manifest(BucketObject, frozen=True, kw_only=True):
    """The current revision of a city-day, and the one record of truth about it.

    ``retracted`` maps each country the city left to the revision that took it away. ``history`` holds the revisions
    before this one, the latest first, at most HISTORY_LENGTH_MAX of them. ``records_form`` says where
    in the raw object its records are. ``bad_records`` are left out of the contribution; with ``other_dates_are_bad``,
    those that depart on another date were among them.
    """

    date: dt.date
    city_id: CityId
    city_name: str
    country: CountrySlug
    country_name: str
    revision: int
    contribution: Contribution
    trips_on_other_dates: int
    attempt: str
    raw_key: str
    sha256: str
    size_bytes: int
    upstream_url: str
    etag: str | None
    last_modified: str | None
    plan_revision: int
    request_id: RequestId
    rule_version: int
    ingested_at: dt.datetime
    records_form: str = "array"
    bad_records: int = 0
    other_dates_are_bad: bool = False
    retracted: dict[CountrySlug, int] = {}
    history: tuple[PastRevision, ...] = ()

    @property
    def raw_stored_at(self) -> dt.datetime:
        """When its raw object was stored: later revisions, such as moves, may name the same one."""
        same = [past.ingested_at for past in self.history if past.raw_key == self.raw_key]
        return min([self.ingested_at, *same])

    def made_by(self, attempt: str) -> bool:
        """Tell whether ``attempt`` made this revision or one before it: whether its swap happened."""
        return attempt == self.attempt or any(past.attempt == attempt for past in self.history)


class ReportedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A record of a refused file that breaks a rule: its number from 1, where it begins, and what is wrong with it."""

    record_number: int
    byte_offset: int | None = None
    field: str | None = None
    value: str | None = None
    reason: str


class QuarantineReport(BucketObject, frozen=True, kw_only=True):
    """Why a file was refused as a whole. ``key`` is the raw object that holds its bytes.

    ``reason`` is the sentence that the request shows. ``byte_offset``, ``record_number``, ``field`` and ``value`` are
    those of the fault that ended the reading of the file, or of its first bad record; each may be None.
    ``bad_records`` counts the records that break a rule, as far as the file was read, and ``reported`` holds the first
    of them. ``broke_off`` says why not all of the file came, if it did not. A file that is asked for and refused again
    with the same bytes is not kept twice: ``seen`` counts how often, and ``last_request_id`` asked last.
    """

    date: dt.date
    city_id: CityId
    city_name: str
    country: CountrySlug
    country_name: str
    request_id: RequestId
    plan_revision: int
    attempt: str
    key: str
    upstream_url: str
    etag: str | None
    last_modified: str | None
    sha256: str
    size_bytes: int
    reason: str
    byte_offset: int | None = None
    record_number: int | None = None
    field: str | None = None
    value: str | None = None
    records: int | None = None
    bad_records: int = 0
    reported: tuple[ReportedRecord, ...] = ()
    broke_off: str | None = None
    rule_version: int
    quarantined_at: dt.datetime
    seen: int = 1
    last_seen_at: dt.datetime
    last_request_id: RequestId

    @property
    def report_key(self) -> str:
        """The key of this report."""
        return keys.quarantine_report(self.date, self.city_id, self.attempt)


class AttemptUnderWay(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt at a city-day whose file was being parsed when this was last written."""

    attempt: str
    begun_at: dt.datetime
    alone: bool = False


class AttemptsUnderWay(BucketObject, frozen=True, kw_only=True):
    """Which attempts at a city-day are being parsed, or were when their worker died: the dead stay in."""

    date: dt.date
    city_id: CityId
    under_way: tuple[AttemptUnderWay, ...] = ()


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a summary knows of one city: its contribution, or that it was retracted (a tombstone)."""

    revision: int
    city_name: str = ""
    contribution: Contribution | None = None
    trips_on_other_dates: int = 0
    sha256: str = ""
    ingested_at: dt.datetime | None = None


class PlanChunks(msgspec.Struct, frozen=True, kw_only=True):
    """The expected cities of a country-day under one plan revision: the chunks seen, by number, of ``chunks``."""

    revision: int
    chunks: int
    cities: dict[int, tuple[CityId, ...]]

    @property
    def whole(self) -> bool:
        """Whether every chunk has been seen, so that the plan can be in force."""
        return len(self.cities) == self.chunks


class Summary(BucketObject, frozen=True, kw_only=True):
    """One country-day: totals first, then the plan, then the ledger they are computed from.

    The order of the fields is the order of the bytes: a reader of totals takes the first few KiB alone.
    """

    date: dt.date
    country: CountrySlug
    country_name: str = ""
    version: int = 0
    totals: Contribution = NOTHING
    has_data: bool = False
    cities_reported: int = 0
    cities_expected: int = 0
    complete: bool = False
    last_ingested_at: dt.datetime | None = None
    plan_revision: int = 0
    plans: tuple[PlanChunks, ...] = ()
    ledger: dict[CityId, LedgerEntry] = {}

    @property
    def expected_cities(self) -> frozenset[CityId]:
        """The cities that the plan in force, the last of ``plans`` if it is whole, expects."""
        if not self.plans or not self.plans[-1].whole:
            return frozenset()
        return frozenset(city for cities in self.plans[-1].cities.values() for city in cities)


class SummaryHead(BucketObject, frozen=True, kw_only=True, gc=False):
    """What the first bytes of a Summary say: everything but the plan and the ledger.

    A reader keeps tens of thousands, none of which can be part of a cycle: the garbage collector passes them over.
    """

    date: dt.date
    country: CountrySlug
    country_name: str
    version: int
    totals: Contribution
    has_data: bool
    cities_reported: int
    cities_expected: int
    complete: bool
    last_ingested_at: dt.datetime | None
    plan_revision: int


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A city-day that failed, why, and where its file lies if it was refused.

    ``retried_at`` is when it was last asked for once more: of two failures of a city the later one is told.
    """

    city_id: CityId
    city_name: str
    reason: str
    quarantine_key: str | None = None
    retried_at: dt.datetime | None = None


class CityUnderWay(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A city-day of a request that is started and not yet served.

    ``published`` and ``folded`` map countries to the highest revision published and folded.
    """

    bytes_done: int = 0
    bytes_total: int | None = None
    trips_done: int = 0
    published: dict[CountrySlug, int] = {}
    folded: dict[CountrySlug, int] = {}


class ActiveRequests(BucketObject, frozen=True, kw_only=True):
    """Which request of a date was begun last, and which one is to be begun when that one has ended."""

    date: dt.date
    running: RequestId | None = None
    waiting: RequestId | None = None


class RetriedCity(msgspec.Struct, frozen=True, kw_only=True):
    """A failed city that a retry takes up again."""

    city_id: CityId
    city_name: str


class RetryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The latest retry of a request: which cities it takes up again, and since when.

    ``positions`` is a bitmap over the plan of ``plan_revision``; 0 of a request whose city list could not be read.
    ``count`` is how often the request was retried, and ``cities`` names the first of the cities. An earlier failure of
    such a city, or of the request, does not end the retry.
    """

    count: int
    retried_at: dt.datetime
    plan_revision: int
    positions: str
    cities: tuple[RetriedCity, ...] = ()


class RequestRecord(BucketObject, frozen=True, kw_only=True):
    """The progress of one request: bitmaps over the plan's order, and what is under way.

    ``outcomes`` holds a bitmap for each outcome, and ``served`` one of the cities whose revisions are all folded in
    the live generation: integers in hexadecimal, bit n for position n. ``version`` grows with every change.
    ``cancelled_at`` is when somebody asked for its cities to be skipped that were not started yet. ``dispatched_at`` is
    the time of the latest ``ProcessRequested`` of which the planner has published every task.
    """

    request_id: RequestId
    date: dt.date
    requested_at: dt.datetime
    updated_at: dt.datetime
    version: int = 1
    plan_revision: int = 0
    planned: bool = False
    cities: int = 0
    countries: int = 0
    bad_cities_count: int = 0
    bad_cities: tuple[BadCity, ...] = ()
    failed_reason: str | None = None
    outcomes: dict[Outcome, str] = {}
    served: str = "0"
    under_way: dict[int, CityUnderWay] = {}
    bytes_done: int = 0
    trips_done: int = 0
    failures: dict[int, Failure] = {}
    resent_at: dt.datetime | None = None
    cancelled_at: dt.datetime | None = None
    dispatched_at: dt.datetime | None = None
    retry: RetryRecord | None = None


_PLANS_MARK = b',"plans":'
_encoder = msgspec.json.Encoder()  # msgspec's own sorting takes no maps by number or by enum
_decoders: dict[type[BucketObject], msgspec.json.Decoder[BucketObject]] = {}
_version_decoder = msgspec.json.Decoder(BucketObject)


def encode(stored: BucketObject) -> bytes:
    """Encode a stored object. Whoever makes one sorts its maps, so equal objects are equal bytes."""
    return _encoder.encode(stored)


def decode(kind: type[_Stored], body: bytes, key: str) -> _Stored:
    """Decode a stored object of ``kind``; ``key`` is named in errors.

    Raises CorruptObject for a body that does not decode or that is about something else than its key names, and
    NewerObject for one of a later schema version.
    """
    decoder = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    try:
        stored = decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        _refuse_newer(body, key)
        raise CorruptObject(key, f"is not a readable {kind.__name__}: {error}") from error
    if stored.schema_version > SCHEMA_VERSION:
        _refuse_newer(body, key)
    _refuse_strayed(stored, key)
    return stored  # type: ignore[return-value]  # the decoder of this kind made it


def _refuse_newer(body: bytes, key: str) -> None:
    try:
        version = _version_decoder.decode(body).schema_version
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return
    if version > SCHEMA_VERSION:
        raise NewerObject(key, f"has schema version {version}; this build knows {SCHEMA_VERSION}: upgrade it")


def _refuse_strayed(stored: BucketObject, key: str) -> None:
    match stored:
        case Manifest():
            own = keys.manifest(stored.date, stored.city_id)
            strayed = key.startswith(keys.MANIFESTS) and key != own
        case Plan():
            own = keys.plan(stored.date)
            strayed = key.startswith(keys.PLANS) and key != own
        case ActiveRequests():
            own = keys.active_requests(stored.date)
            strayed = key.startswith(keys.ACTIVE_REQUESTS) and key != own
        case Summary() | SummaryHead():
            own = f"{stored.date}/{stored.country}"
            strayed = key.startswith(keys.SUMMARIES) and keys.parse_summary(key) != (stored.date, stored.country)
        case _:
            return
    if strayed:
        raise CorruptObject(key, f"holds what belongs to {own}")


def decode_head(first_bytes: bytes, key: str) -> SummaryHead:
    """Decode the totals of a summary from its first bytes, without the plan and the ledger.

    A quote inside a JSON string is always escaped, so the mark of the next field cannot stand inside a name.
    """
    end = first_bytes.find(_PLANS_MARK)
    if end < 0:
        raise CorruptObject(key, f"does not begin like a summary: no field 'plans' in {len(first_bytes)} bytes")
    return decode(SummaryHead, first_bytes[:end] + b"}", key)
