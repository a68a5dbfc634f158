"""What the commands about topics, raw objects and restored backups do and print. Loaded by a command when it runs."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import msgspec
import typer
from rich.table import Table

from services.aggregate.bucket_reader import Dates
from services.aggregate.replay.topic_reader import KafkaTopicReader
from shared.domain.contribution import Contribution
from shared.domain.ids import CityId, CountrySlug, utc_now
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaPublisher
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings
from shared.storage.s3 import S3Store
from tripfold.operate.command_line import (
    command_settings,
    console,
    print_json,
    printable,
    progress_console,
    run_command,
)
from tripfold.operate.progress_bar import progress_bar, wait
from tripfold.operate.reprocess import Reprocess, Reprocessed, Selection
from tripfold.operate.republish import republish
from tripfold.operate.restore import (
    Reissued,
    Restored,
    TopicHighest,
    highest_of,
    raise_base,
    reissue,
    seconds_of,
)
from tripfold.operate.terminal import KEPT_MAX, LINES_MAX
from tripfold.operate.topic_audit import COMPACTED, TopicAudit
from tripfold.operate.topic_records import RecordDifference, UnreadRecord, UnreadRecords

UNREAD_LINES_MAX = 20


class _Bars:
    """Shows one progress bar after the other, one for each step."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._step = ""
        self._show: Callable[..., None] = lambda *_: None
        self._begun_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def report(self, step: str, done: int, total: int) -> None:
        """Show how far a step is."""
        if step != self._step:
            self._stack.close()
            self._show = self._stack.enter_context(progress_bar(step, ""))
            self._step, self._begun_s = step, time.monotonic()
        elapsed_s = max(time.monotonic() - self._begun_s, 1e-3)
        self._show(done, max(done, total), f"{done / elapsed_s:,.0f} a second")


def _open_topics(settings: Settings) -> Callable[[Topic], contextlib.AbstractAsyncContextManager[KafkaTopicReader]]:
    @contextlib.asynccontextmanager
    async def open_topic(topic: Topic) -> AsyncIterator[KafkaTopicReader]:
        replay = KafkaTopicReader(settings, topic)
        try:
            yield replay
        finally:
            await replay.close()

    return open_topic


def verify_topics(first: dt.date | None, last: dt.date | None, *, as_json: bool) -> None:
    """Compare the compacted topics with the bucket, and say where they differ."""
    settings = command_settings()
    keys_of = dict.fromkeys((topic.value for topic in COMPACTED), 0)

    async def run() -> tuple[int, list[RecordDifference], UnreadRecords]:
        total = 0
        told: list[RecordDifference] = []
        async with S3Store(settings) as store, KafkaPublisher(settings, source="verify") as publisher:
            await publisher.check()
            with _Bars() as bars:
                audit = TopicAudit(store, _open_topics(settings), wait=wait, report=bars.report)
                for topic in COMPACTED:
                    async for audited in audit.run(topic, Dates(first, last)):
                        keys_of[topic.value] += audited.keys
                        total += len(audited.differences)
                        told += audited.differences[: KEPT_MAX - len(told)]
        return total, told, audit.unread

    total, told, unread = run_command(run())
    if not as_json:
        _tell_unread(unread.total, unread.named)
    if as_json:
        document = {"keys": keys_of, "differences_total": total, "differences": told}
        print_json({**document, "skipped_total": unread.total, "skipped": unread.named})
    elif told:
        table = Table("topic", "key", "what", "found", "expected")
        for one in told[:LINES_MAX]:
            table.add_row(one.topic.value, printable(one.key), one.what, printable(one.found), one.expected)
        console.print(table)
        more = f" (the first {LINES_MAX:,} are shown)" if total > LINES_MAX else ""
        console.print(
            f"{total:,} found wrong{more} in {_of_topics(keys_of)}; 'tripfold republish' publishes the bucket again"
        )
    else:
        console.print(f"{_of_topics(keys_of)} are as the bucket says")
    if told:
        raise typer.Exit(1)


def _tell_unread(total: int, named: Sequence[UnreadRecord]) -> None:
    """Name the records that were skipped because this build cannot read them."""
    for one in named[:UNREAD_LINES_MAX]:
        console.print(f"skipped: {printable(str(one))}", highlight=False, soft_wrap=True)
    if total > UNREAD_LINES_MAX:
        console.print(f"and {total - UNREAD_LINES_MAX:,} more records were skipped; --json names up to 1,000")


def _of_topics(keys_of: dict[str, int]) -> str:
    return " and ".join(f"{count:,} keys of {topic}" for topic, count in keys_of.items())


def republish_dates(first: dt.date | None, last: dt.date | None, *, as_json: bool) -> None:
    """Publish the bucket to the compacted topics again, and say what cannot be read."""
    settings = command_settings()
    published = dates = 0
    unreadable: dict[str, str] = {}
    current: dt.date | None = None

    async def run() -> None:
        nonlocal published, dates, current
        async with S3Store(settings) as store, KafkaPublisher(settings, source="republish") as publisher:
            await publisher.check()
            with progress_bar("republishing", "dates") as show:
                async for one in republish(store, publisher, Dates(first, last)):
                    published, dates, current = published + one.events, dates + 1, one.date
                    unreadable.update(one.unreadable)
                    show(one.dates_done, one.dates_total)

    try:
        run_command(run())
    except BaseException:
        if current is not None:
            progress_console.print(f"{dates:,} dates are published; continue with --from {current}")
        raise
    if as_json:
        print_json({"dates": dates, "events": published, "unreadable": unreadable})
    else:
        for reason in list(unreadable.values())[:LINES_MAX]:
            console.print(f"not published: {printable(reason)}", highlight=False, soft_wrap=True)
        console.print(f"{published:,} events of {dates:,} dates published")
    if unreadable:
        raise typer.Exit(1)


def reprocess(
    first: dt.date | None,
    last: dt.date | None,
    *,
    country: str | None,
    city: str | None,
    again: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Reprocess the city-days that were asked for, and say what changed."""
    settings = command_settings()
    selection = Selection(
        dates=Dates(first, last),
        country=None if country is None else CountrySlug(country),
        city_id=None if city is None else CityId(city),
        again=again,
    )

    async def run() -> tuple[int, int, list[Reprocessed]]:
        city_days = total_bytes = 0
        told: list[Reprocessed] = []
        with ThreadPoolExecutor(settings.ingest_streams, thread_name_prefix="fold") as threads:
            async with S3Store(settings) as store, KafkaPublisher(settings, source="reprocess") as publisher:
                await publisher.check()
                job = Reprocess(
                    store,
                    publisher,
                    clock=utc_now,
                    rules=settings.file_rules,
                    threads=threads,
                    streams=settings.ingest_streams,
                    dry_run=dry_run,
                )
                with progress_bar("reprocessing", "dates") as show:
                    async for one in job.run(selection):
                        city_days += one.city_days
                        total_bytes += one.bytes_read
                        told += one.reprocessed
                        show(one.dates_done, one.dates_total, f", {city_days:,} city-days, {total_bytes:,} bytes")
        return city_days, total_bytes, told

    city_days, total_bytes, told = run_command(run())
    refused = sum(one.refused is not None for one in told)
    reprocessed = sum(one.after is not None for one in told)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "city_days": city_days,
                "bytes_read": total_bytes,
                "reprocessed": reprocessed,
                "refused": refused,
                "found": told[:KEPT_MAX],
            }
        )
    else:
        if told:
            console.print(_table_of_reprocessed(told))
        became = "would get a new revision" if dry_run else "got a new revision"
        console.print(
            f"{reprocessed:,} of {city_days:,} city-days {became}, {refused:,} refused, "
            f"{len(told) - reprocessed - refused:,} only published again; {total_bytes:,} bytes read"
        )
    if refused:
        raise typer.Exit(1)


def _table_of_reprocessed(told: Iterable[Reprocessed]) -> Table:
    table = Table("date", "country", "city", "revision", "trips", "passengers", "accidents", "delay ms", "")
    for number, one in enumerate(told):
        if number == LINES_MAX:
            table.caption = f"the first {LINES_MAX}; --json prints up to {KEPT_MAX}"
            break
        revision = _arrow(one.revision_before, one.revision_after)
        remark = f"left as it was: {printable(one.refused)}" if one.refused else "" if one.after else "published again"
        table.add_row(str(one.date), one.country, one.city_id, revision, *_sums(one.before, one.after), remark)
    return table


def _sums(before: Contribution, after: Contribution | None) -> list[str]:
    fields = ("trips", "passengers", "accidents", "delay_total_ms")
    return [_arrow(getattr(before, field), getattr(after, field) if after else None) for field in fields]


def _arrow(before: int, after: int | None) -> str:
    return str(before) if after is None or after == before else f"{before} → {after}"


def restore(*, base: int | None, now: bool, dry_run: bool, as_json: bool) -> None:
    """Raise the base of the lineage, give new revisions to what the topic knows better, and say what to do next."""
    settings = command_settings()
    wanted = seconds_of(utc_now()) if now else base

    async def run() -> tuple[Restored, list[Reissued], str]:
        async with S3Store(settings) as store, KafkaPublisher(settings, source="restore") as publisher:
            await store.check()
            topic, away = None, ""
            try:
                topic = await _topic_highest(settings)
            except DependencyUnavailable as error:
                if wanted is None:
                    raise
                away = str(error)
            restored = await raise_base(store, topic=topic, wanted=wanted, clock=utc_now, dry_run=dry_run)
            if dry_run or topic is None:
                return restored, [], away
            with _Bars() as bars:
                audit = TopicAudit(store, _open_topics(settings), wait=wait, report=bars.report)
                return restored, [one async for one in reissue(store, publisher, audit)], away

    restored, reissued, away = run_command(run())
    refused = [one for one in reissued if one.refused is not None]
    if as_json:
        print_json({**msgspec.structs.asdict(restored), "reissued": reissued})
    else:
        _tell_restored(restored, away)
        if not dry_run:
            for one in refused[:LINES_MAX]:
                told = printable(f"{one.key}: {one.refused}")
                console.print(told, highlight=False, soft_wrap=True)
            console.print(
                f"{len(reissued) - len(refused):,} keys got new revisions, {len(refused):,} could not; start the "
                f"services, then run 'tripfold republish'",
                soft_wrap=True,
            )
    if refused:
        raise typer.Exit(1)


def _tell_restored(restored: Restored, away: str) -> None:
    if restored.topic is not None:
        _tell_unread(restored.topic.unread_total, restored.topic.unread)
    if restored.topic is None:
        console.print(f"the topic was not read: {away}", highlight=False, soft_wrap=True)
    elif restored.topic.records:
        console.print(
            f"the highest revision that the topic knows is {restored.topic.revision}, of {restored.topic.key} "
            f"({restored.topic.records:,} records read)",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print("the topic is empty")
    if restored.base == restored.base_before:
        console.print(f"the base is {restored.base}, which is above that")
        return
    would = "would be" if restored.dry_run else "is"
    console.print(f"the base {would} {restored.base}; it was {restored.base_before or 'not set'}")


async def _topic_highest(settings: Settings) -> TopicHighest:
    async with KafkaPublisher(settings, source="restore") as publisher:
        await publisher.check()
    async with _open_topics(settings)(Topic.CITY_STATS) as replay:
        with progress_bar("reading city-stats", "records") as show:
            return await highest_of(replay, show)
