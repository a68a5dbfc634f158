"""What an operator's commands do and print. Loaded by a command when it runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Self

import typer
from rich.table import Table

from services.aggregate.audit.compare import RAW_OBJECT, Difference
from services.aggregate.audit.repair import Repaired, repair_dates
from services.aggregate.audit.verify import verify_dates
from services.aggregate.bucket_reader import Dates
from services.aggregate.consumer import tune_collector
from services.aggregate.replay import generations
from services.aggregate.replay.diff import Side
from services.aggregate.replay.generations import Generation, drop, list_generations
from services.aggregate.replay.rebuild import Rebuild, Rebuilt
from services.aggregate.replay.topic_reader import KafkaTopicReader, PairReader
from shared.domain.ids import utc_now
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaPublisher
from shared.runtime.settings import Settings
from shared.storage.generation_pointer import read_current
from shared.storage.s3 import S3Store
from tripfold.operate.command_line import (
    command_settings,
    console,
    print_json,
    printable,
    run_command,
)
from tripfold.operate.doctor import Examined, examine
from tripfold.operate.gc import Swept, clean, parse_age
from tripfold.operate.progress_bar import progress_bar, wait

LINES_MAX = 1_000
WHY_MAX = 3
KEPT_MAX = 10_000
"""What is told at most, in JSON: the rest is only counted."""


def verify(first: dt.date | None, last: dt.date | None, *, deep: bool, as_json: bool) -> None:
    """Verify a range of dates, and say what differs."""
    settings = command_settings()

    retention = settings.raw_retention
    expired_before = None if retention is None else utc_now() - retention

    async def run() -> tuple[int, int, int, int, list[Difference]]:
        dates_done = country_days = total = raw_expired = 0
        told: list[Difference] = []
        async with S3Store(settings) as store:
            with progress_bar("verifying", "dates") as show:
                async for verified in verify_dates(
                    store, Dates(first, last), deep=deep, wait=wait, raw_expired_before=expired_before
                ):
                    dates_done += 1
                    country_days += verified.country_days
                    total += len(verified.differences)
                    raw_expired += verified.raw_expired
                    told += verified.differences[: KEPT_MAX - len(told)]
                    show(verified.dates_done, verified.dates_total)
        return dates_done, country_days, total, raw_expired, told

    dates_done, country_days, total, raw_expired, told = run_command(run())
    if as_json:
        print_json(
            {
                "dates": dates_done,
                "country_days": country_days,
                "differences_total": total,
                "raw_expired": raw_expired,
                "differences": told,
            }
        )
    elif told:
        console.print(_table_of(told))
        console.print(f"{total:,} found wrong in {country_days} country-days; 'tripfold repair' makes summaries again")
        if any(one.what.startswith(RAW_OBJECT) for one in told):
            console.print("not raw objects: request the dates again, which downloads those that are lost")
    else:
        console.print(f"{country_days} country-days of {dates_done} dates are as the manifests say")
    if raw_expired and not as_json:
        console.print(f"{raw_expired:,} raw objects have expired (TRIPFOLD_RAW_RETENTION_DAYS)")
    if told:
        raise typer.Exit(1)


def repair(first: dt.date | None, last: dt.date | None, *, drop_lost: bool, as_json: bool) -> None:
    """Repair a range of dates, and say what was wrong."""
    settings = command_settings()

    async def run() -> tuple[int, int, list[Repaired]]:
        total = refused = 0
        done: list[Repaired] = []
        async with S3Store(settings) as store, KafkaPublisher(settings, source="repair") as publisher:
            await publisher.check()
            with progress_bar("repairing", "dates") as show:
                dates = Dates(first, last)
                async for repaired in repair_dates(store, publisher, dates, wait=wait, drop_lost=drop_lost):
                    total += len(repaired.country_days)
                    refused += sum(one.refused is not None for one in repaired.country_days)
                    done += repaired.country_days[: KEPT_MAX - len(done)]
                    show(repaired.dates_done, repaired.dates_total)
        return total, refused, done

    total, refused, done = run_command(run())
    if as_json:
        print_json({"repaired": total - refused, "refused": refused, "country_days": done})
    elif done:
        table = Table("date", "country", "version before", "version", "what was wrong")
        for one in done[:LINES_MAX]:
            version = str(one.version_after) if one.refused is None else f"not repaired: {one.refused}"
            wrong = "; ".join(_sentence_of(difference) for difference in one.differences[:3])
            row = (str(one.date), one.country, str(one.version_before), version, wrong)
            table.add_row(*map(printable, row))
        console.print(table)
        console.print(f"{total - refused:,} summaries made again, {refused:,} refused")
    else:
        console.print("nothing to repair")
    if refused:
        raise typer.Exit(1)


def rebuild(*, from_kafka: bool, dry_run: bool, take_over: bool, as_json: bool) -> None:
    """Rebuild all summaries from the topic or from the bucket, and say what changed."""
    settings = command_settings()

    async def run() -> Rebuilt:
        if not from_kafka:
            return await _run_rebuild(settings, take_over=take_over, dry_run=dry_run)
        replay = KafkaTopicReader(settings, Topic.CITY_STATS)
        try:
            return await _run_rebuild(settings, take_over=take_over, dry_run=dry_run, replay=replay)
        finally:
            await replay.close()

    _tell(run_command(run()), dry_run=dry_run, as_json=as_json)


def list_all(*, as_json: bool) -> None:
    """Show all generations."""
    settings = command_settings()

    async def run() -> list[Generation]:
        async with S3Store(settings) as store:
            return await list_generations(store)

    found = run_command(run())
    if as_json:
        print_json(found)
        return
    table = Table("generation", "state", "summaries", "bytes")
    for one in found:
        table.add_row(str(one.number), one.state.value, f"{one.summaries:,}", f"{one.size_bytes:,}")
    console.print(table)


def drop_one(number: int, *, grace_s: int) -> None:
    """Delete the summaries of an old generation."""
    settings = command_settings()

    async def run() -> int:
        async with S3Store(settings) as store:
            return await drop(store, number, grace=dt.timedelta(seconds=grace_s))

    console.print(f"{run_command(run())} summaries of generation {number} deleted")


def activate(number: int, *, dry_run: bool, take_over: bool, as_json: bool) -> None:
    """Make a generation that begins with an old one the live one, and say what changed."""
    settings = command_settings()

    rebuilt = run_command(_run_rebuild(settings, take_over=take_over, dry_run=dry_run, seed=number))
    _tell(rebuilt, dry_run=dry_run, as_json=as_json)


async def _run_rebuild(
    settings: Settings, *, take_over: bool, dry_run: bool, replay: PairReader | None = None, seed: int | None = None
) -> Rebuilt:
    tune_collector()
    token = uuid.uuid4().hex
    async with S3Store(settings) as store, KafkaPublisher(settings, source="rebuild") as publisher:
        await publisher.check()
        with _Steps() as steps:
            job = Rebuild(store, publisher, token=token, report=steps.report, reader=replay, seed=seed)
            return await job.run(take_over=take_over, dry_run=dry_run)


def abandon_rebuild() -> None:
    """Clear the mark of a rebuild that died."""
    settings = command_settings()

    async def run() -> int | None:
        async with S3Store(settings) as store:
            current = await read_current(store)
            if current.token is not None:
                await generations.abandon(store, current.token)
            return current.building

    building = run_command(run())
    if building is None:
        console.print("no rebuild is under way: nothing to clear")
    else:
        console.print(
            f"the rebuild into generation {building} is abandoned. If it still runs, it will fail without harm",
            soft_wrap=True,
        )


class _Steps:
    """Shows the steps of a rebuild, each with a bar, events per second and the time left."""

    def __init__(self) -> None:
        self._bars = contextlib.ExitStack()
        self._step = ""
        self._show: Callable[..., None] = lambda *_: None
        self._begun_s = 0.0
        self._events_before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.close()

    def report(self, step: str, done: int, total: int, events: int) -> None:
        """Show how far a step is."""
        if step != self._step:
            self._bars.close()
            self._show = self._bars.enter_context(progress_bar(step, ""))
            self._step, self._begun_s, self._events_before = step, time.monotonic(), events
        elapsed_s = max(time.monotonic() - self._begun_s, 1e-3)
        self._show(done, total, f"{(events - self._events_before) / elapsed_s:,.0f} events/s")


def _tell(rebuilt: Rebuilt, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json(rebuilt)
    else:
        _tell_in_words(rebuilt, dry_run=dry_run)
    if rebuilt.refused is not None:
        raise typer.Exit(1)


def _tell_in_words(rebuilt: Rebuilt, *, dry_run: bool) -> None:
    if rebuilt.changes:
        table = Table("date", "country", "", "version", "trips", "passengers", "accidents", "delay ms", "cities", "why")
        for change in rebuilt.changes[:LINES_MAX]:
            why = "; ".join(change.why[:WHY_MAX]) + (" …" if len(change.why) > WHY_MAX else "")
            for name, side, reason in (("live", change.live, ""), ("built", change.built, why)):
                table.add_row(str(change.date), change.country, name, *_row_of(side), printable(reason))
        console.print(table)
    console.print(
        f"generation {rebuilt.generation} was built from {rebuilt.events:,} events: {rebuilt.country_days:,} "
        f"country-days, {rebuilt.changes_total:,} of them other than in generation {rebuilt.live_before}"
    )
    if rebuilt.poison_records:
        console.print(f"{rebuilt.poison_records} records of the topic could not be decoded, and count nowhere")
    if rebuilt.newer_records:
        console.print(f"{rebuilt.newer_records} records of the topic have a later schema version, and were left out")
    if rebuilt.refused is not None:
        console.print(f"[red]it was not made live:[/red] {printable(rebuilt.refused)}", highlight=False, soft_wrap=True)
    elif dry_run:
        console.print("a dry run: it was deleted, and nothing has changed")
    else:
        console.print(
            f"it is live; 'tripfold generations drop {rebuilt.live_before}' deletes the one before, once it is not read"
        )


def _row_of(side: Side | None) -> tuple[str, ...]:
    if side is None:
        return ("none", "", "", "", "", "")
    totals = side.totals
    numbers = (side.version, totals.trips, totals.passengers, totals.accidents, totals.delay_total_ms)
    return (*map(str, numbers), f"{side.cities_reported} of {side.cities_expected}")


def gc(*, older_than: str, dry_run: bool, as_json: bool) -> None:
    """Clean up, and say what went."""
    settings = command_settings()

    async def run() -> tuple[int, int, list[Swept]]:
        deleted = size_bytes = 0
        found: list[Swept] = []
        async with S3Store(settings) as store:
            async for one in clean(
                store,
                older_than=parse_age(older_than),
                quarantine_older_than=dt.timedelta(days=settings.quarantine_days),
                deadline_s=settings.ingest_deadline_s,
                dry_run=dry_run,
            ):
                deleted += one.verdict.deleted
                size_bytes += one.size_bytes if one.verdict.deleted else 0
                found += [one][: KEPT_MAX - len(found)]
        return deleted, size_bytes, found

    deleted, size_bytes, found = run_command(run())
    if as_json:
        print_json({"dry_run": dry_run, "deleted": deleted, "size_bytes": size_bytes, "found": found})
        return
    if found:
        table = Table("key", "what", "bytes", "written")
        for one in found[:LINES_MAX]:
            table.add_row(
                printable(one.key), one.verdict.value, f"{one.size_bytes:,}", f"{one.written_at:%Y-%m-%d %H:%M}"
            )
        console.print(table)
    console.print(f"{deleted:,} {'would be ' if dry_run else ''}deleted, {size_bytes:,} bytes")


def doctor(*, as_json: bool) -> None:
    """Examine the surroundings, and say what is at fault."""
    settings = command_settings()

    async def run() -> list[Examined]:
        return [one async for one in examine(settings)]

    found = run_command(run())
    if as_json:
        print_json(found)
    else:
        table = Table("what", "", "found", "remedy")
        for one in found:
            verdict = "[green]ok[/green]" if one.ok else "[red]failed[/red]"
            table.add_row(one.what, verdict, printable(one.found), printable(one.remedy))
        console.print(table)
    if not all(one.ok for one in found):
        raise typer.Exit(1)


def _table_of(differences: Iterable[Difference]) -> Table:
    table = Table("date", "country", "city", "what", "found", "expected")
    for number, one in enumerate(differences):
        if number == LINES_MAX:
            table.caption = f"the first {LINES_MAX}; --json prints up to {KEPT_MAX}"
            break
        found = f"{one.found} (still in flight)" if one.in_flight else one.found
        row = (str(one.date), one.country, one.city_id or "", one.what, found, one.expected)
        table.add_row(*map(printable, row))
    return table


def _sentence_of(difference: Difference) -> str:
    where = f"city {difference.city_id}: " if difference.city_id else ""
    return f"{where}{difference.what} {difference.found}, expected {difference.expected}"
