"""The functions that the fuzzer calls with made-up bytes. Each raises for bytes that break a law, and for no others.

`make fuzz` makes up bytes, guided by the branches that they reach. The tests replay `corpus/`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args
from unittest import mock
from urllib.parse import quote, unquote_to_bytes

import msgspec

from services.aggregate.audit.recount import AuditParser
from services.aggregate.bucket_reader import events_of_whole_plan
from services.aggregate.fold import StatEvent, empty_summary, fold, join
from services.aggregate.requests.fold import ProgressEvent, fold_progress
from services.aggregate.summary_writer import summary_event
from services.api.backfills import service as backfills
from services.api.http.problems import MEDIA_TYPE, Problem
from services.api.quarantine.service import file_of
from services.api.requests import event_stream
from services.api.requests import service as requests
from services.api.statistics.ledger import ledger_of, page_of
from services.api.statistics.model import day_detail
from services.ingest.parsing.parser import InvalidTripFile, ParserLimits, total_trip_file
from services.ingest.planner.city_list import InvalidCityList, parse_city_list
from services.ingest.planner.country_slugs import mint_slugs
from services.ingest.upstream.decoding import BadCoding, decoder_of
from shared.domain import events, keys, objects
from shared.domain.backfills import NotPossible, estimated_end, free_slots, is_closed, positions_to_retry
from shared.domain.events import IngestCity, NewerContract, PoisonRecord, RequestPlanned
from shared.domain.file_rules import BadRecordsMax, FileRules, RecordsForm
from shared.domain.objects import (
    Backfill,
    BucketObject,
    CorruptObject,
    Countries,
    Manifest,
    Plan,
    QuarantineReport,
    RequestRecord,
    Schedule,
    Summary,
)
from shared.domain.outbox import events_of_manifest
from shared.domain.requests import (
    NothingToRetry,
    cancelled_record,
    is_stalled,
    new_record,
    request_event,
    retried_record,
    unfinished_of,
)
from shared.domain.schedules import due_run, next_due
from shared.domain.topics import Topic
from tests.fakes.api import NOW, REQUEST, World, planned, report_of, stats, write_report

DATE: Final = "2024-05-01"
RULES: Final = tuple(
    FileRules(
        form=RecordsForm.parse(form), bad_records_max=BadRecordsMax.parse(bad_records_max), other_dates_are_bad=other
    )
    for form in ("array", "lines", "/data/trips", "/a.b/~1")
    for bad_records_max in ("0", "1", "50%", "100%")
    for other in (False, True)
)


def trip_file(data: bytes) -> None:
    """Give a file to both paths of the parser, cut differently. The first four bytes choose the rules and the cuts.

    Totals, bad records and refusals are equal, and the independent parser of the audit counts the same.
    """
    if len(data) < 4:
        return
    choice, chunk_bytes, window, retreats, *_ = data
    body, rules = data[4:], RULES[choice % len(RULES)]
    whole = _totals(body, len(body) + 1, ParserLimits(), rules, force_strict=True)
    limits = ParserLimits(window_bytes=20 + 4 * window, retreats=retreats % 5)
    for force_strict in (False, True):
        assert _totals(body, chunk_bytes + 1, limits, rules, force_strict=force_strict) == whole
    numbers, bad_records, _ = whole
    if isinstance(numbers, str):
        return
    counter = AuditParser(DATE, form=rules.form, other_dates_are_bad=rules.other_dates_are_bad)
    for start in range(0, len(body), 100):
        counter.feed(body[start : start + 100])
    counted = counter.end()
    again = (counted.trips, counted.passengers, counted.accidents, counted.delay_total_ms, counted.trips_on_other_dates)
    assert (again, counted.bad_records) == (numbers, bad_records)


def _totals(body: bytes, chunk_bytes: int, limits: ParserLimits, rules: FileRules, *, force_strict: bool) -> Any:
    chunks = iter([body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)])
    try:
        found = total_trip_file(
            lambda: next(chunks, b""), date=DATE, rules=rules, limits=limits, force_strict=force_strict
        )
    except InvalidTripFile as error:
        return str(error), error.bad_records, error.reported
    sums = found.contribution
    numbers = sums.trips, sums.passengers, sums.accidents, sums.delay_total_ms, found.trips_on_other_dates
    return numbers, found.bad_records, found.reported


CODINGS: Final = ("gzip", "deflate", "br", "zstd")
CODED_BYTES_MAX: Final = 1024**2


def coded_body(data: bytes) -> None:
    """Decode a body whole and in pieces: equal bytes come out. The first two bytes choose coding and pieces.

    Bytes that are corrupt may decode in one of the two: libzstd checks the length of a frame only if it has all of it.
    """
    if len(data) < 2:
        return
    coding, piece_bytes, body = CODINGS[data[0] % 4], data[1] + 1, data[2:]
    whole = _decoded(coding, [body])
    cut = _decoded(coding, [body[start : start + piece_bytes] for start in range(0, len(body), piece_bytes)])
    assert cut == whole or None in {cut, whole}


def _decoded(coding: str, pieces: list[bytes]) -> bytes | None:
    """Return the start of what the pieces decode to, or None if they do not decode."""
    decoder = decoder_of(coding)
    assert decoder is not None
    decoded = b""
    try:
        for piece in pieces:
            for step in decoder.decode(piece):
                decoded += step
                if len(decoded) > CODED_BYTES_MAX:
                    return decoded[:CODED_BYTES_MAX]
        decoder.finish()
    except BadCoding:
        return None
    return decoded


def city_list(data: bytes) -> None:
    """Parse a list of cities. It is refused, or its entries are all counted, and fit into a plan and into events."""
    try:
        reference = _json(data.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        reference = None  # Tripfold may read more: bytes that are not UTF-8 make an entry bad, not the list
    try:
        listed = parse_city_list(data)
    except InvalidCityList as error:
        assert str(error).encode()
        assert not isinstance(reference, list)
        return
    if reference is not None:
        assert len(reference) == len(listed.cities) + listed.bad_cities_count
    cities = tuple(one.city for one in listed.cities)
    assert len({city.city_id for city in cities}) == len(cities)
    slugs = mint_slugs(Countries(), {one.country_name for one in listed.cities})
    for position, one in enumerate(listed.cities):
        assert keys.parse_date(keys.raw(NOW.date(), one.city.city_id, "a")) == NOW.date()
        task = IngestCity(
            request_id=REQUEST,
            date=NOW.date(),
            city_id=one.city.city_id,
            upstream_id=one.city.upstream_id,
            city_name=one.city.name,
            country=slugs.slugs[one.country_name],
            country_name=one.country_name,
            plan_revision=1,
            position=position,
        )
        assert events.decode(Topic.CITY_TASKS, events.encode(task)) == task
    if cities or listed.bad_cities:
        done = RequestPlanned(
            request_id=REQUEST,
            date=NOW.date(),
            requested_at=NOW,
            plan_revision=1,
            cities=len(cities),
            countries=len(set(slugs.slugs.values())),
            bad_cities_count=listed.bad_cities_count,
            bad_cities=listed.bad_cities,
        )
        assert events.decode(Topic.REQUEST_PROGRESS, events.encode(done)) == done


def _json(data: bytes) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(data.decode(), parse_constant=refuse, parse_int=float)


def event(data: bytes) -> None:
    """Decode the value of a record; the first line names the topic. An event that is read can be folded."""
    name, _, value = data.partition(b"\n")
    topic = TOPICS.get(name.decode("latin-1"))
    if topic is None:
        return
    try:
        read = events.decode(topic, value)
    except (PoisonRecord, NewerContract) as error:
        assert str(error).encode()
        return
    encoded = events.encode(read)
    assert events.encode(events.decode(topic, encoded)) == encoded
    headers = dict(events.headers_of(read, source="fuzz"))
    assert read.key.encode()
    assert headers["ce_id"]
    if isinstance(read, get_args(StatEvent)):
        summary = fold(empty_summary(read.date, read.country), [read])
        assert fold(summary, [read]) is summary
        assert objects.encode(join(empty_summary(summary.date, summary.country), summary)) == objects.encode(summary)
        _check_summary(summary)
    elif isinstance(read, get_args(ProgressEvent)):
        record = fold_progress(new_record(REQUEST, dt.date(2024, 5, 1), NOW), [read], NOW)
        assert fold_progress(record, [read], NOW) is record
        _check_request(record)


def stored_object(data: bytes) -> None:
    """Decode a stored object; the first line names its kind. The services can show and change each decoded object."""
    name, _, body = data.partition(b"\n")
    kind = KINDS.get(name.decode("latin-1"))
    if kind is None:
        return
    try:
        stored = objects.decode(kind, body, "somewhere")
    except CorruptObject as error:
        assert str(error).encode()
        return
    encoded = objects.encode(stored)
    assert objects.encode(objects.decode(kind, encoded, "somewhere")) == encoded
    CHECKS.get(kind, lambda _: None)(stored)


def _check_request(record: RequestRecord) -> None:
    msgspec.json.encode(requests.detail_of(record))
    msgspec.json.encode(requests.overview_of(record))
    is_stalled(record, NOW, after=dt.timedelta(hours=1), wait_max=dt.timedelta(hours=1))
    unfinished_of(record)
    for change in (cancelled_record, retried_record):
        try:
            events.encode(request_event(change(record, NOW)))
        except NothingToRetry:
            continue


def _check_backfill(backfill: Backfill) -> None:
    msgspec.json.encode(backfills.detail_of(backfill))
    estimated_end(backfill)
    free_slots(backfill)
    positions_to_retry(backfill)
    is_closed(backfill)
    for change in backfills.CHANGES.values():
        try:
            objects.encode(change(backfill, NOW))
        except NotPossible:
            continue


def _check_schedule(schedule: Schedule) -> None:
    try:
        next_due(schedule)
        due_run(schedule, NOW)
    except CorruptObject:
        return


def _check_manifest(manifest: Manifest) -> None:
    for one in events_of_manifest(manifest):
        assert events.decode(Topic.CITY_STATS, events.encode(one)) == one
    manifest.expired_raw_keys(NOW)


def _check_plan(plan: Plan) -> None:
    for one in events_of_whole_plan(plan):
        assert events.decode(Topic.CITY_STATS, events.encode(one)) == one


def _check_summary(summary: Summary) -> None:
    one = summary_event(summary)
    if summary.version:
        assert events.decode(Topic.COUNTRY_DAY_SUMMARIES, events.encode(one)) == one
    head = objects.decode_head(objects.encode(summary), "somewhere")
    assert day_detail(head, country_name="x") == day_detail(summary, country_name="x")
    msgspec.json.encode(ledger_of(summary, page_of(summary, after="", limit=10), {}, limit=10, planned_names={}))


TOPICS: Final = {topic.value: topic for topic in Topic if topic is not Topic.DEAD_LETTERS}
KINDS: Final = {kind.__name__: kind for kind in BucketObject.__subclasses__()}
CHECKS: Final[Mapping[type[BucketObject], Callable[[Any], object]]] = {
    RequestRecord: _check_request,
    Backfill: _check_backfill,
    Schedule: _check_schedule,
    Manifest: _check_manifest,
    Plan: _check_plan,
    Summary: _check_summary,
    QuarantineReport: file_of,
}


class _Api:
    """The API over a bucket in memory, which is replaced when it has grown."""

    WORLD_REQUESTS_MAX: Final = 500

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._calls = self.WORLD_REQUESTS_MAX

    def call(self, scope: dict[str, Any]) -> tuple[int, dict[bytes, bytes], bytes]:
        """Return status, headers and body of the response."""
        if self._calls >= self.WORLD_REQUESTS_MAX:
            world = World()
            world.fold_in(stats("armenia", accidents=1), planned("armenia", city_ids=["7", "8"]))
            write_report(world, report_of("7"))
            self._app, self._calls = world.app(api_requests_per_minute=1_000_000), 0
        self._calls += 1
        with mock.patch.object(event_stream, "WAIT_MAX_S", 0):  # nobody carries the requests out
            return self._loop.run_until_complete(self._call(scope))

    async def _call(self, scope: dict[str, Any]) -> tuple[int, dict[bytes, bytes], bytes]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)  # type: ignore[arg-type]  # it has what an HTTP scope has
        start, *rest = sent
        return start["status"], dict(start["headers"]), b"".join(one.get("body", b"") for one in rest)


PATHS: Final = (
    ("GET", "/country-stats"),
    ("GET", "/country-stats/armenia/2024-05-01"),
    ("POST", "/process-request"),
    ("GET", "/process-requests"),
    ("POST", "/backfills"),
    ("GET", "/backfills"),
    ("PUT", "/schedules/daily"),
    ("GET", "/quarantine"),
    ("GET", ""),
    ("GET", "/country-completeness"),
    ("POST", "/quarantine/retry"),
)
"""Operations that read a query. The one without a path takes it from the bytes too."""
HEADERS: Final = (b"accept", b"accept-encoding", b"if-none-match", b"idempotency-key", b"prefer", b"authorization")
ASCII: Final = "".join(map(chr, range(0x21, 0x7F)))
NO_HEADER: Final = re.compile(rb"[^\t -~\x80-\xff]")
_api: list[_Api] = []


def query(data: bytes) -> None:
    """Send a request; the first byte chooses the operation. Line breaks separate the query and the headers.

    The API responds to every request, and says in a problem why it refuses one.
    """
    if not data:
        return
    method, path = PATHS[data[0] % len(PATHS)]
    first, *values = data[1:].split(b"\n")
    raw_path, _, query_string = first.partition(b"?") if not path else (path.encode(), b"", first)
    # The HTTP server refuses other bytes in a URL or a header.
    raw_path, query_string = (quote(part, safe=ASCII).encode() for part in (raw_path, query_string))
    headers = [(name, NO_HEADER.sub(b"", value).strip()) for name, value in zip(HEADERS, values, strict=False) if value]
    if not _api:
        _api.append(_Api())
    status, sent, body = _api[0].call(
        {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote_to_bytes(b"/" + raw_path.lstrip(b"/")).decode("utf-8", "replace"),
            "raw_path": b"/" + raw_path.lstrip(b"/"),
            "root_path": "",
            "query_string": query_string,
            "headers": [(b"host", b"localhost"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
    )
    assert status < 500, (status, body)
    if status >= 400 and b"content-encoding" not in sent:
        assert sent[b"content-type"] == MEDIA_TYPE.encode()
        problem = msgspec.json.decode(body, type=Problem)
        assert (problem.status, bool(problem.detail)) == (status, True)


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "trip-file": trip_file,
    "coded-body": coded_body,
    "city-list": city_list,
    "event": event,
    "stored-object": stored_object,
    "query": query,
}
