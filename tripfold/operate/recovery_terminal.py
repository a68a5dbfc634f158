"""What the commands for what failed do and print. Loaded by a command when it runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import datetime as dt
import sys
from collections.abc import AsyncIterator, Sequence

import msgspec
from rich.table import Table

from services.aggregate.replay.topic_reader import KafkaTopicReader, TopicReader
from services.api.requests.service import RequestDetail, RequestOverview
from shared.domain import bitmap
from shared.domain.errors import OperatorError
from shared.domain.events import ProcessRequested
from shared.domain.ids import utc_now
from shared.domain.objects import QuarantineReport
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaPublisher
from shared.runtime.settings import Settings
from shared.storage.s3 import S3Store
from tripfold.operate import dead_letters, quarantine, requests
from tripfold.operate.command_line import argument_column, command_settings, console, print_json, printable, run_command
from tripfold.operate.dead_letters import LETTERS_MAX, DeadLetter, OpenTopic, Wanted
from tripfold.operate.quarantine import Chosen, NothingQuarantined, Retried

LINES_MAX = 1_000
SHOWN_LENGTH_MAX = 300
SHOWN_VALUE_LENGTH_MAX = 20_000


class UnknownTopic(OperatorError):
    """There is no such topic that dead letters can come from."""


def list_requests(*, limit: int, as_json: bool) -> None:
    """Show the latest requests."""
    settings = command_settings()

    async def read() -> list[RequestOverview]:
        async with S3Store(settings) as store:
            return await requests.latest_requests(store, limit=limit)

    found = run_command(read())
    if as_json:
        print_json(found)
        return
    table = Table(argument_column("request"), "date", "status", "cities", "failed", "requested")
    for one in found:
        cities = f"{one.counts.cities_done}/{one.counts.cities_total}"
        failed = str(one.counts.cities_failed or "")
        table.add_row(one.id, str(one.date), one.status.value, cities, failed, f"{one.requested_at:%Y-%m-%d %H:%M}")
    console.print(table)


def show_request(request_id: str, *, as_json: bool) -> None:
    """Show one request."""
    settings = command_settings()

    async def read() -> RequestDetail:
        async with S3Store(settings) as store:
            return await requests.request_detail(store, request_id)

    found = run_command(read())
    if as_json:
        print_json(found)
        return
    counts = found.counts
    console.print(
        f"{found.id}: {found.date}, {found.status.value}, {counts.cities_done} of {counts.cities_total} cities"
    )
    if found.failed_reason is not None:
        console.print(printable(found.failed_reason), highlight=False, soft_wrap=True)
    if found.failures:
        table = Table(argument_column("city", folded=True), "name", "reason", "in quarantine")
        for failure in found.failures:
            told = (failure.city_id, failure.city_name, failure.reason, failure.quarantine_key or "")
            table.add_row(*map(printable, told))
        console.print(table)
    if counts.cities_failed > len(found.failures):
        console.print(f"{counts.cities_failed} cities have failed; the first {len(found.failures)} are named")
    if counts.cities_failed or found.failed_reason is not None:
        console.print(f"'tripfold requests retry {found.id}' takes up what failed")
    for bad in found.bad_cities:
        told_of = printable(f"{bad.entry}: {bad.reason}")
        console.print(f"left out of the list of cities: {told_of}", highlight=False, soft_wrap=True)


def retry_requests(request_ids: Sequence[str], *, as_json: bool) -> None:
    """Take up the failed cities of requests again."""
    settings = command_settings()

    async def retry() -> list[ProcessRequested]:
        async with S3Store(settings) as store, KafkaPublisher(settings, source="retry") as publisher:
            return await requests.retry_requests(store, publisher, request_ids, clock=utc_now)

    retried = run_command(retry())
    if as_json:
        print_json([{"request_id": one.request_id, "date": one.date, "cities": _cities_of(one)} for one in retried])
        return
    for one in retried:
        cities = _cities_of(one)
        what = "its list of cities, and then all of them" if cities is None else f"{cities} failed cities"
        console.print(f"request {one.request_id} of {one.date}: asked for {what} again")


def list_quarantined(
    first: dt.date | None, last: dt.date | None, *, country: str | None, city_id: str | None, as_json: bool
) -> None:
    """Show the files in quarantine."""
    settings = command_settings()
    chosen = Chosen(first=first, last=last, country=country, city_id=city_id)

    async def read() -> list[QuarantineReport]:
        async with S3Store(settings) as store:
            return await quarantine.read_reports(store, chosen)

    found = run_command(read())
    if as_json:
        print_json(found)
        return
    date, city = argument_column("date"), argument_column("city", folded=True)
    table = Table(date, "country", city, "name", "bytes", "bad records", "reason", "refused (UTC)", "seen")
    for one in found[:LINES_MAX]:
        told = (one.country, one.city_id, one.city_name, f"{one.size_bytes:,}", str(one.bad_records), one.reason)
        shown = (printable(text, length_max=SHOWN_LENGTH_MAX) for text in told)
        table.add_row(str(one.date), *shown, f"{one.quarantined_at:%Y-%m-%d %H:%M}", str(one.seen))
    console.print(table)
    console.print(f"{len(found):,} files in quarantine; 'tripfold quarantine show DATE CITY' says more of one")


def show_quarantined(date: dt.date, city_id: str, *, everything: bool, as_json: bool) -> None:
    """Show the report on a refused file, or all on its city-day."""
    settings = command_settings()

    async def read() -> list[QuarantineReport]:
        async with S3Store(settings) as store:
            return await quarantine.read_city_day(store, date, city_id)

    found = run_command(read())
    told = found if everything else found[:1]
    if as_json:
        print_json(told if everything else told[0])
        return
    for report in told:
        _show_report(report)
    if len(found) > len(told):
        console.print(f"{len(found)} files of this city-day are in quarantine; --all shows the reports on all of them")


def _show_report(report: QuarantineReport) -> None:
    lines = {
        "city-day": f"{report.date}, city {report.city_id} ({report.city_name}), {report.country}",
        "why": report.reason,
        "cut off": report.broke_off or "",
        "bad records": f"{report.bad_records:,}" + (f" of {report.records:,}" if report.records is not None else ""),
        "file": f"{report.key}, {report.size_bytes:,} bytes",
        "sha256": report.sha256,
        "upstream": report.upstream_url,
        "validators": ", ".join(filter(None, (report.etag, report.last_modified))),
        "refused": f"{report.quarantined_at:%Y-%m-%d %H:%M:%S} UTC, request {report.request_id}",
        "seen": f"{report.seen} times, last {report.last_seen_at:%Y-%m-%d %H:%M:%S} UTC, by {report.last_request_id}",
    }
    for name, text in lines.items():
        if text:
            console.print(f"[bold]{name:>11}[/bold]  {printable(text)}", highlight=False, soft_wrap=True)
    if report.reported:
        table = Table("record", "byte", "field", "value", "reason")
        for record in report.reported:
            place = (str(record.record_number), "" if record.byte_offset is None else str(record.byte_offset))
            table.add_row(*place, *map(printable, (record.field or "", record.value or "", record.reason)))
        if report.bad_records > len(report.reported):
            table.caption = f"the first {len(report.reported)} of {report.bad_records:,}"
        console.print(table)


def retry_quarantined(
    first: dt.date | None, last: dt.date | None, *, country: str | None, city_id: str | None, as_json: bool
) -> None:
    """Ask for refused files once more."""
    settings = command_settings()
    chosen = Chosen(first=first, last=last, country=country, city_id=city_id)

    async def retry() -> Retried:
        async with S3Store(settings) as store, KafkaPublisher(settings, source="retry") as publisher:
            reports = await quarantine.read_reports(store, chosen)
            if not reports:
                raise NothingQuarantined("no such file is in quarantine; see 'tripfold quarantine list'")
            return await quarantine.retry_reports(store, publisher, reports, clock=utc_now)

    retried = run_command(retry())
    if as_json:
        print_json(
            {
                "requests": [one.request_id for one in retried.requests],
                "asked": [{"date": one.date, "city_id": one.city_id} for one in retried.asked],
                "settled": [{"date": one.date, "city_id": one.city_id} for one in retried.settled],
            }
        )
        return
    for one in retried.asked:
        told = printable(f"{one.date}, city {one.city_id} ({one.city_name})")
        console.print(f"{told}: asked for again in request {one.last_request_id}", highlight=False, soft_wrap=True)
    for one in retried.settled:
        told = printable(f"{one.date}, city {one.city_id} ({one.city_name})")
        console.print(f"{told}: not failed in request {one.last_request_id}, or that has not ended", soft_wrap=True)


def list_letters(
    first: dt.date | None, last: dt.date | None, *, topic: str | None, limit: int, depth: int, as_json: bool
) -> None:
    """Show the latest dead letters."""
    settings = command_settings()
    wanted = Wanted(origin_topic=_topic_of(topic), first=first, last=last)
    found = run_command(dead_letters.list_letters(_dead_letters(settings, depth), wanted, limit=limit))
    if as_json:
        print_json({"total": found.total, "letters": [_told(letter) for letter in found.letters]})
        return
    table = Table(argument_column("letter"), "buried (UTC)", "from", "key", "error", "sent back")
    for one in found.letters:
        origin = f"{one.origin_topic} {one.origin_partition}/{one.origin_offset}"
        told = (origin, _text_of(one.key), one.error)
        back = f"{one.retried_at:%Y-%m-%d %H:%M}" if one.retried_at else ""
        shown = (printable(text, length_max=SHOWN_LENGTH_MAX) for text in told)
        table.add_row(one.id, f"{one.buried_at:%Y-%m-%d %H:%M:%S}", *shown, back)
    console.print(table)
    console.print(f"{len(found.letters)} of {found.total:,} dead letters")


def show_letter(letter_id: str, *, raw: bool, depth: int, as_json: bool) -> None:
    """Show one dead letter."""
    settings = command_settings()
    letter = run_command(dead_letters.read_letter(_dead_letters(settings, depth), letter_id))
    if raw:
        sys.stdout.buffer.write(letter.value or b"")
        return
    if as_json:
        print_json(_told(letter))
        return
    lines = {
        "letter": letter.id,
        "buried": f"{letter.buried_at:%Y-%m-%d %H:%M:%S} UTC",
        "from": f"{letter.origin_topic}, partition {letter.origin_partition}, offset {letter.origin_offset}",
        "error": letter.error,
        "sent back": f"{letter.retried_at:%Y-%m-%d %H:%M:%S} UTC" if letter.retried_at else "no",
        "key": _text_of(letter.key),
        **{f"header {name}": _text_of(value) for name, value in letter.headers},
        f"value, {letter.size_bytes:,} bytes": _text_of(letter.value),
    }
    for name, text in lines.items():
        shown = printable(text, length_max=SHOWN_VALUE_LENGTH_MAX)
        console.print(f"[bold]{printable(name)}[/bold]  {shown}", highlight=False, soft_wrap=True)


def retry_letters(
    letter_ids: Sequence[str] | None,
    first: dt.date | None,
    last: dt.date | None,
    *,
    topic: str | None,
    again: bool,
    depth: int,
    as_json: bool,
) -> None:
    """Send dead letters back, those named or, without names, all that were not sent back yet."""
    settings = command_settings()
    open_topic = _dead_letters(settings, depth)

    async def retry() -> list[DeadLetter]:
        chosen = letter_ids
        if not chosen:
            wanted = Wanted(origin_topic=_topic_of(topic), first=first, last=last)
            listing = await dead_letters.list_letters(open_topic, wanted, limit=LETTERS_MAX)
            chosen = [letter.id for letter in listing.letters if again or letter.retried_at is None]
        async with KafkaPublisher(settings, source="retry") as publisher:
            return await dead_letters.send_back(open_topic, publisher, chosen, clock=utc_now, again=again)

    letters = run_command(retry())
    if as_json:
        print_json([{"id": letter.id, "topic": letter.origin_topic} for letter in letters])
        return
    for letter in letters:
        console.print(f"{letter.id} sent back to {letter.origin_topic}")
    if not letters:
        console.print("nothing to send back")


def _dead_letters(settings: Settings, depth: int) -> OpenTopic:
    @contextlib.asynccontextmanager
    async def open_topic() -> AsyncIterator[TopicReader]:
        replay = KafkaTopicReader(settings, Topic.DEAD_LETTERS, last_records_max=depth)
        try:
            yield replay
        finally:
            await replay.close()

    return open_topic


def _topic_of(name: str | None) -> str | None:
    known = [topic.value for topic in Topic if topic is not Topic.DEAD_LETTERS]
    if name is not None and name not in known:
        raise UnknownTopic(f"there is no topic {name[:100]!r}: expected one of {', '.join(known)}")
    return name


def _told(letter: DeadLetter) -> dict[str, object]:
    """Return a letter for JSON, which holds no bytes: what is no UTF-8 is escaped."""
    told = msgspec.structs.asdict(letter)
    told["key"] = None if letter.key is None else _text_of(letter.key)
    told["value"] = None if letter.value is None else _text_of(letter.value)
    told["headers"] = [[name, _text_of(value)] for name, value in letter.headers]
    return told


def _text_of(data: bytes | None) -> str:
    return "none" if data is None else data.decode(errors="backslashreplace")


def _cities_of(requested: ProcessRequested) -> int | None:
    return bitmap.size(requested.retry.positions) if requested.retry else None
