"""What the commands for what failed do and print. Loaded by a command when it runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import datetime as dt
import sys
from collections.abc import AsyncIterator, Sequence

import msgspec
from rich.table import Table

from services.aggregate.replay import KafkaReplay, Replay
from services.api.requests import RequestDetail, RequestOverview
from services.operate import dead_letters, requests
from services.operate.command_line import command_settings, console, print_json, printable, run_command
from services.operate.dead_letters import LETTERS_MAX, DeadLetter, OpenTopic, Wanted
from shared import bitmap
from shared.errors import OperatorError
from shared.events import ProcessRequested
from shared.identity import utc_now
from shared.publishing import KafkaPublisher
from shared.settings import Settings
from shared.store import S3Store
from shared.topics import Topic

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
    table = Table("request", "date", "status", "cities", "failed", "requested")
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
        table = Table("city", "name", "reason", "in quarantine")
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
    table = Table("letter", "buried (UTC)", "from", "key", "error", "sent back")
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
    async def open_topic() -> AsyncIterator[Replay]:
        replay = KafkaReplay(settings, Topic.DEAD_LETTERS, last_records_max=depth)
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
