"""The events in Kafka, as frozen and tagged types.

An event is encoded as JSON, with its type in ``type`` and the version of the contract in ``schema_version``.
New fields of the contract have defaults. No field is removed or changes its type. Readers ignore unknown fields.
Headers follow the Kafka binding of CloudEvents 1.0 in binary mode.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from shared.domain import schema
from shared.domain.contribution import Contribution, Totals
from shared.domain.errors import OperatorError
from shared.domain.ids import (
    EXACT_MAX,
    CityField,
    CountField,
    CountryField,
    InstantField,
    NameField,
    RequestField,
    RequestId,
    RevisionField,
    SchemaVersionField,
)
from shared.domain.topics import Topic

TYPE_LENGTH_SHOWN_MAX = 100
PLAN_CHUNK_CITIES_MAX = 2_000

CityIds = Annotated[tuple[CityField, ...], msgspec.Meta(max_length=PLAN_CHUNK_CITIES_MAX)]
POSITIONS_MAX = 10_000_000
PositionField = Annotated[int, msgspec.Meta(ge=0, lt=POSITIONS_MAX)]
CitiesField = Annotated[int, msgspec.Meta(ge=0, le=POSITIONS_MAX)]
"""The number of cities of a plan, which is the length of its bitmaps."""
ReasonField = Annotated[str, msgspec.Meta(max_length=2_000)]
PositionsField = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]+$(?!\n)", max_length=100_000, examples=["5"])]


class Outcome(enum.Enum):
    """The outcome of a city-day of a request, in ascending order. The highest of several counts."""

    FAILED = "failed"
    SKIPPED = "skipped"
    UNCHANGED = "unchanged"
    STORED = "stored"

    @property
    def rank(self) -> int:
        """The position in the order failed < skipped < unchanged < stored."""
        return list(Outcome).index(self)


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """The base of events: a type and the version of the contract."""

    topic: ClassVar[Topic]
    schema_version: SchemaVersionField = schema.FIRST_VERSION

    @property
    def key(self) -> str:
        """The record key. Compaction keeps the last record of each key."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """Distinguishes events of one type and key. The same event published again has the same identity."""
        return ""


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """The cities of a request to retry, and the time at which the retry was requested.

    ``positions`` is a hexadecimal bitmap in the order of the plan of ``plan_revision``; bit n stands for position n. If
    the date has a later plan, all of its cities are processed.
    """

    plan_revision: RevisionField
    positions: PositionsField
    retried_at: InstantField


class Source(enum.Enum):
    """Where the files of a request are read: at the upstream, or in the bucket, where they are stored."""

    UPSTREAM = "upstream"
    BUCKET = "bucket"


class Background(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Marks work of a backfill, which must not delay other work.

    ``country`` and ``city_id`` limit it to cities of each date. If ``again`` is set, stored files are read even if the
    present rules should give the same totals.
    """

    source: Source = Source.UPSTREAM
    country: CountryField | None = None
    city_id: CityField | None = None
    again: bool = False


BACKGROUND = Background()
"""Work of a backfill that reads every file at the upstream."""


class Retryable(Event, frozen=True, kw_only=True):
    """The base of events that are published again for a later attempt when the upstream fails.

    ``failed_attempts`` counts attempts with a transient error. The next attempt is not before ``not_before``.
    ``down_since`` is the time since which the upstream is unavailable to the event.
    """

    failed_attempts: CountField = 0
    not_before: InstantField | None = None
    down_since: InstantField | None = None

    @property
    def runs_from(self) -> Topic:
        """The topic in which the event is handled."""
        return self.topic


class ProcessRequested(Retryable, frozen=True, kw_only=True, tag="process-requested"):
    """A client requested a date or, with ``retry``, a retry of some cities of a request.

    ``resent_at`` is the time at which a stalled request, or one whose city list could not be read, was published again.
    Only its unfinished cities are then processed. ``background`` is absent unless a backfill made the request.
    """

    topic: ClassVar[Topic] = Topic.PROCESS_REQUESTS
    request_id: RequestField
    date: dt.date
    requested_at: InstantField
    retry: Retry | None = None
    resent_at: InstantField | None = None
    background: Background | UnsetType = UNSET

    @property
    def key(self) -> str:
        return self.date.isoformat()

    @property
    def identity(self) -> str:
        requested = _retried(_retried(self.request_id, self.retry.retried_at if self.retry else None), self.resent_at)
        return requested + _attempt(self)


class IngestCity(Retryable, frozen=True, kw_only=True, tag="ingest-city"):
    """The task to fetch one city-day. ``position`` is the position of the city in the plan of ``plan_revision``.

    ``retried_at`` is the time of the retry of a failed city. ``background`` is absent unless a backfill made its
    request.
    """

    topic: ClassVar[Topic] = Topic.CITY_TASKS
    request_id: RequestField
    date: dt.date
    city_id: CityField
    upstream_id: str
    city_name: NameField
    country: CountryField
    country_name: NameField
    plan_revision: RevisionField
    position: PositionField
    retried_at: InstantField | None = None
    background: Background | UnsetType = UNSET

    @property
    def source(self) -> Source:
        """Where the file is read."""
        return self.background.source if self.background else Source.UPSTREAM

    @property
    def runs_from(self) -> Topic:
        """The topic from which workers run this task."""
        return Topic.CITY_TASKS if self.background is UNSET else Topic.BACKGROUND_TASKS

    @property
    def key(self) -> str:
        return f"{self.date}/{self.city_id}"

    @property
    def identity(self) -> str:
        return _retried(f"{self.request_id}/{self.plan_revision}{_attempt(self)}", self.retried_at)


class CityDayStats(Event, frozen=True, kw_only=True, gc=False, tag="city-day-stats"):
    """The contribution of one city-day to its country-day. It replaces every lower revision.

    ``bad_records`` counts the records of the file that were left out because they break a rule. ``suspicious`` says why
    the volume of the file is unusual; it is absent if it is not.
    """

    topic: ClassVar[Topic] = Topic.CITY_STATS
    date: dt.date
    country: CountryField
    country_name: NameField
    city_id: CityField
    city_name: NameField
    revision: RevisionField
    contribution: Contribution
    trips_on_other_dates: CountField
    raw_key: str
    sha256: str
    size_bytes: CountField
    rule_version: CountField
    ingested_at: InstantField
    bad_records: CountField = 0
    suspicious: ReasonField | UnsetType = UNSET

    @property
    def key(self) -> str:
        return f"{self.date}/{self.country}/{self.city_id}"

    @property
    def identity(self) -> str:
        return str(self.revision)


class CityDayRetracted(Event, frozen=True, kw_only=True, tag="city-day-retracted"):
    """A city-day no longer contributes to this country, because the city moved to another one."""

    topic: ClassVar[Topic] = Topic.CITY_STATS
    date: dt.date
    country: CountryField
    city_id: CityField
    revision: RevisionField

    @property
    def key(self) -> str:
        return f"{self.date}/{self.country}/{self.city_id}"

    @property
    def identity(self) -> str:
        return str(self.revision)


class CountryDayPlanned(Event, frozen=True, kw_only=True, tag="country-day-planned"):
    """The cities that a country-day expects, or none: one of ``chunks`` parts, each with its own key."""

    topic: ClassVar[Topic] = Topic.CITY_STATS
    date: dt.date
    country: CountryField
    country_name: NameField
    plan_revision: RevisionField
    city_ids: CityIds
    chunk: Annotated[int, msgspec.Meta(ge=0, lt=10_000)] = 0
    chunks: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1

    @property
    def key(self) -> str:
        # No city id starts with a plus sign, so the key of a later chunk is never the key of a city.
        chunk = f"/+{self.chunk}" if self.chunk else ""
        return f"{self.date}/{self.country}{chunk}"

    @property
    def identity(self) -> str:
        return f"{self.plan_revision}/{self.chunk}"


class CountryDaySummary(Event, frozen=True, kw_only=True, tag="country-day-summary"):
    """The totals of one country-day. ``version`` grows with every change; keep the highest version of each key."""

    topic: ClassVar[Topic] = Topic.COUNTRY_DAY_SUMMARIES
    date: dt.date
    country: CountryField
    country_name: str
    version: Annotated[int, msgspec.Meta(ge=1, le=EXACT_MAX)]
    totals: Totals
    cities_reported: CountField
    cities_expected: CountField
    complete: bool
    last_ingested_at: InstantField | None
    cities_suspicious: CountField | UnsetType = UNSET

    @property
    def key(self) -> str:
        return f"{self.date}/{self.country}"

    @property
    def identity(self) -> str:
        return str(self.version)


class BadCity(msgspec.Struct, frozen=True, kw_only=True):
    """An invalid entry of the upstream's city list, and the reason."""

    entry: Annotated[str, msgspec.Meta(max_length=300)]
    reason: ReasonField


class RequestPlanned(Event, frozen=True, kw_only=True, tag="request-planned"):
    """The planner has planned the request and knows the number of its cities."""

    topic: ClassVar[Topic] = Topic.REQUEST_PROGRESS
    request_id: RequestField
    date: dt.date
    requested_at: InstantField
    plan_revision: RevisionField
    cities: CitiesField
    countries: CountField
    bad_cities_count: CountField = 0
    bad_cities: tuple[BadCity, ...] = ()

    @property
    def key(self) -> str:
        return self.request_id

    @property
    def identity(self) -> str:
        return str(self.plan_revision)


class CityProgressed(Event, frozen=True, kw_only=True, tag="city-progressed"):
    """The progress of a city-day that is being streamed, at most once a second for each stream."""

    topic: ClassVar[Topic] = Topic.REQUEST_PROGRESS
    request_id: RequestField
    date: dt.date
    city_id: CityField
    plan_revision: RevisionField
    position: PositionField
    bytes_done: CountField
    bytes_total: CountField | None
    trips_done: CountField

    @property
    def key(self) -> str:
        return self.request_id

    @property
    def identity(self) -> str:
        return f"{self.plan_revision}/{self.position}/{self.bytes_done}"


class Published(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A revision that a worker published for a country, as statistics or as a retraction."""

    country: CountryField
    revision: RevisionField


class CityFinished(Event, frozen=True, kw_only=True, tag="city-finished"):
    """A city-day of a request has ended. It is served once every pair in ``published`` is folded.

    ``quarantine_key`` is the raw key of a refused file. ``retried_at`` is that of the task.
    """

    topic: ClassVar[Topic] = Topic.REQUEST_PROGRESS
    request_id: RequestField
    date: dt.date
    city_id: CityField
    city_name: NameField
    plan_revision: RevisionField
    position: PositionField
    outcome: Outcome
    reason: ReasonField | None = None
    size_bytes: CountField = 0
    trips: CountField = 0
    published: tuple[Published, ...] = ()
    quarantine_key: str | None = None
    retried_at: InstantField | None = None

    @property
    def key(self) -> str:
        return self.request_id

    @property
    def identity(self) -> str:
        pairs = ",".join(f"{pair.country}:{pair.revision}" for pair in self.published)
        return _retried(f"{self.plan_revision}/{self.position}/{self.outcome.value}/{pairs}", self.retried_at)


class CityFolded(Event, frozen=True, kw_only=True, tag="city-folded"):
    """The live summary of a country-day contains a revision that a request caused or found unchanged."""

    topic: ClassVar[Topic] = Topic.REQUEST_PROGRESS
    request_id: RequestField
    date: dt.date
    city_id: CityField
    plan_revision: RevisionField
    position: PositionField
    country: CountryField
    revision: RevisionField

    @property
    def key(self) -> str:
        return self.request_id

    @property
    def identity(self) -> str:
        return f"{self.plan_revision}/{self.position}/{self.country}/{self.revision}"


class RequestFailed(Event, frozen=True, kw_only=True, tag="request-failed"):
    """The whole request failed, and the reason. ``retried_at`` is that of the failed retry.

    If no entry of the city list was valid, ``bad_cities_count`` counts them, and ``bad_cities`` has the first.
    """

    topic: ClassVar[Topic] = Topic.REQUEST_PROGRESS
    request_id: RequestField
    date: dt.date
    requested_at: InstantField
    reason: ReasonField
    retried_at: InstantField | None = None
    bad_cities_count: CountField = 0
    bad_cities: tuple[BadCity, ...] = ()

    @property
    def key(self) -> str:
        return self.request_id

    @property
    def identity(self) -> str:
        return _retried("", self.retried_at)


def _retried(identity: str, retried_at: dt.datetime | None) -> str:
    return identity if retried_at is None else f"{identity}/{retried_at.isoformat()}"


def _attempt(event: Retryable) -> str:
    return f"/{event.failed_attempts}" if event.failed_attempts else ""


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """The task for which a worker published a revision. It is in headers, so that the body stays the same each time."""

    request_id: RequestField
    plan_revision: RevisionField
    position: PositionField


EVENT_TYPES: Mapping[Topic, tuple[type[Event], ...]] = {
    Topic.PROCESS_REQUESTS: (ProcessRequested,),
    Topic.CITY_TASKS: (IngestCity,),
    Topic.RETRIES: (IngestCity, ProcessRequested),
    Topic.BACKGROUND_TASKS: (IngestCity,),
    Topic.CITY_STATS: (CityDayStats, CityDayRetracted, CountryDayPlanned),
    Topic.COUNTRY_DAY_SUMMARIES: (CountryDaySummary,),
    Topic.REQUEST_PROGRESS: (RequestPlanned, CityProgressed, CityFinished, CityFolded, RequestFailed),
}


class PoisonRecord(ValueError):
    """A record that is not valid in any version of the contract. It goes to the dead letters."""


class NewerContract(OperatorError):
    """A record has a later schema version than this build supports. Upgrade the build, or skip the record.

    ``partition`` and ``offset`` are None if the reader does not know them.
    """

    def __init__(
        self, topic: Topic, kind: str, version: int, *, partition: int | None = None, offset: int | None = None
    ) -> None:
        self.topic = topic
        self.kind = kind
        self.version = version
        self.partition = partition
        self.offset = offset
        known = partition is not None and offset is not None
        where = f"partition {partition}, offset {offset} of {topic.value}" if known else f"a record of {topic.value}"
        skip = f", or move it to the dead letters: tripfold skip {topic.value} {partition} {offset}" if known else ""
        super().__init__(
            f"{where} has type {kind[:TYPE_LENGTH_SHOWN_MAX]!r}, schema version {version}; this build knows version "
            f"{schema.SCHEMA_VERSION}: upgrade it{skip}"
        )

    def at(self, partition: int, offset: int) -> NewerContract:
        """Return this error with the partition and offset of the record."""
        return NewerContract(self.topic, self.kind, self.version, partition=partition, offset=offset)


class _Envelope(msgspec.Struct, frozen=True):
    type: str
    schema_version: SchemaVersionField = schema.FIRST_VERSION


_envelope_decoder = msgspec.json.Decoder(_Envelope)
_encoder = msgspec.json.Encoder(order="deterministic")


class _NoEvent(Event, frozen=True, kw_only=True, tag=""):
    """No event: msgspec requires the field ``type`` only of a union of several types."""


def _decoder(kinds: tuple[type[Event], ...]) -> msgspec.json.Decoder[Event]:
    union: type[Event] = _NoEvent
    for kind in kinds:
        union = union | kind  # type: ignore[assignment]  # a union of types is not a type to mypy
    return msgspec.json.Decoder(union)


_decoders = {topic: _decoder(kinds) for topic, kinds in EVENT_TYPES.items()}


def encode(event: Event) -> bytes:
    """Encode an event canonically, under the schema version that is written now: equal events have equal bytes."""
    return _encoder.encode(schema.stamped(event))


def decode(topic: Topic, value: bytes | None) -> Event:
    """Decode the value of a record of ``topic``, strictly and in one pass.

    Raises PoisonRecord for a value that is not an event of this topic, including an unknown type. Raises NewerContract
    for an event of a later schema version.
    """
    if value is None:
        raise PoisonRecord("the record has no value; the topics of Tripfold have no tombstones")
    try:
        event = _decoders[topic].decode(value)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        _refuse_newer(topic, value)
        raise PoisonRecord(f"not an event of {topic.value}: {error}") from error
    if isinstance(event, _NoEvent):
        raise PoisonRecord(f"not an event of {topic.value}: its type is empty")
    if event.schema_version > schema.SCHEMA_VERSION:
        raise NewerContract(topic, str(event.__struct_config__.tag), event.schema_version)
    return event


def _refuse_newer(topic: Topic, value: bytes) -> None:
    try:
        envelope = _envelope_decoder.decode(value)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return
    if envelope.schema_version > schema.SCHEMA_VERSION:
        raise NewerContract(topic, envelope.type, envelope.schema_version)


def headers_of(event: Event, *, source: str, cause: Cause | None = None) -> list[tuple[str, bytes]]:
    """Return the record headers of an event: CloudEvents attributes, request id and cause."""
    kind = str(event.__struct_config__.tag)
    request_id: RequestId | None = cause.request_id if cause else getattr(event, "request_id", None)
    parts = [kind, event.key, event.identity, request_id or ""]
    headers = {
        "ce_specversion": "1.0",
        "ce_id": ":".join(parts),
        "ce_type": f"tripfold.{kind}.v{schema.stamped_version(event)}",
        "ce_source": f"/tripfold/{source}",
        "content-type": "application/json",
    }
    if request_id:
        headers["ce_requestid"] = request_id
    if cause:
        headers["ce_planrevision"] = str(cause.plan_revision)
        headers["ce_position"] = str(cause.position)
    return [(name, value.encode()) for name, value in headers.items()]


def cause_of(headers: Mapping[str, bytes]) -> Cause | None:
    """Return the task that caused a record from its headers, or None if they have no valid one."""
    try:
        return msgspec.convert(
            {
                "request_id": headers["ce_requestid"].decode(),
                "plan_revision": int(headers["ce_planrevision"]),
                "position": int(headers["ce_position"]),
            },
            Cause,
        )
    except (KeyError, ValueError):
        return None
