"""Builds generations of all summaries beside the live one, and makes them live, lists them and deletes old ones."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from typing import Annotated

import typer

from services.aggregate.consumer import tune_collector
from services.aggregate.replay import generations
from services.aggregate.replay.diff import GenerationFigures
from services.aggregate.replay.generations import Generation, drop, list_generations
from services.aggregate.replay.rebuild import Rebuild, Rebuilt
from services.aggregate.replay.topic_reader import RawReader
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaPublisher
from shared.runtime.settings import Settings
from shared.storage.generation_pointer import read_current
from tripfold.console import Records, print_remark, printable
from tripfold.operate.command_line import (
    AsJson,
    StepBars,
    command_settings,
    console,
    open_bucket,
    print_json,
    print_line,
    run_command,
)
from tripfold.operate.topic_audit import kafka_topics

GRACE_S = 900
REASONS_MAX = 3

generations_commands = typer.Typer(
    help="The generations of summaries in the bucket.", no_args_is_help=True, add_completion=False
)

_DryRun = Annotated[bool, typer.Option("--dry-run", help="Build and compare, then delete the new generation.")]
_TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Start although another rebuild is marked. That one fails, without harm.")
]


class Source(enum.Enum):
    """Where a rebuild reads."""

    S3 = "s3"
    KAFKA = "kafka"


def rebuild_command(
    *,
    source: Annotated[
        Source | None,
        typer.Option("--from", help="s3: plans and manifests. kafka: the topic city-stats, then plans and manifests."),
    ] = None,
    dry_run: _DryRun = False,
    take_over: _TakeOver = False,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="Build nothing. Clear the mark of a rebuild that crashed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build a generation of all summaries beside the live one, compare the two, and make the new one live.

    Services keep running. Exit 1 if the new generation is refused, because the live one has something newer. Afterwards
    the option --from s3 fills the compacted topics again, as after a loss of Kafka.

    A killed rebuild changes nothing that is served, but its mark stays and blocks the next rebuild. Then start the next
    one with --take-over, or clear the mark with --abandon.

    Example: tripfold rebuild --from s3 --dry-run

    Example: tripfold rebuild --from kafka --json > differences.json

    Example: tripfold rebuild --abandon
    """
    if abandon:
        if source is not None or dry_run or take_over or as_json:
            raise typer.BadParameter("use it without other options: it builds nothing", param_hint="--abandon")
        _abandon_rebuild()
        return
    if source is None:
        raise typer.BadParameter("missing: give s3 or kafka", param_hint="--from")
    settings = command_settings()

    async def run() -> Rebuilt:
        if source is Source.S3:
            return await _run_rebuild(settings, take_over=take_over, dry_run=dry_run)
        async with kafka_topics(settings)(Topic.CITY_STATS) as reader:
            return await _run_rebuild(settings, take_over=take_over, dry_run=dry_run, replay=reader)

    _print_rebuilt(run_command(run()), dry_run=dry_run, as_json=as_json)


@generations_commands.command("list")
def list_command(*, as_json: AsJson = False) -> None:
    """List the generations of summaries: live, being built, or old.

    Example: tripfold generations list
    """
    settings = command_settings()

    async def run() -> list[Generation]:
        async with open_bucket(settings) as store:
            return await list_generations(store)

    found = run_command(run())
    if as_json:
        print_json(found)
        return
    records = Records("generation", "state", "summaries", "bytes")
    for one in found:
        records.add(str(one.number), one.state.value, one.summaries, one.size_bytes)
    records.print(console)


@generations_commands.command("drop")
def drop_command(
    number: Annotated[int, typer.Argument(metavar="GENERATION", min=1, help="The generation's number.")],
    grace_s: Annotated[
        int,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="How long ago the pointer must have changed, so that no reader uses the generation.",
        ),
    ] = GRACE_S,
) -> None:
    """Delete the summaries of an old generation.

    Example: tripfold generations drop 1
    """
    settings = command_settings()

    async def run() -> int:
        async with open_bucket(settings) as store:
            return await drop(store, number, grace=dt.timedelta(seconds=grace_s))

    console.print(f"Deleted {run_command(run()):,} summaries of generation {number}.")


@generations_commands.command("activate")
def activate_command(
    number: Annotated[int, typer.Argument(metavar="GENERATION", min=1, help="The generation's number.")],
    *,
    dry_run: _DryRun = False,
    take_over: _TakeOver = False,
    as_json: AsJson = False,
) -> None:
    """Build a generation from the summaries of an old one, joined with plans and manifests, and make it live.

    Example: tripfold generations activate 1
    """
    settings = command_settings()
    rebuilt = run_command(_run_rebuild(settings, take_over=take_over, dry_run=dry_run, seed=number))
    _print_rebuilt(rebuilt, dry_run=dry_run, as_json=as_json)


def _abandon_rebuild() -> None:
    settings = command_settings()

    async def run() -> int | None:
        async with open_bucket(settings) as store:
            current = await read_current(store)
            if current.token is not None:
                await generations.abandon(store, current.token)
            return current.building

    building = run_command(run())
    if building is None:
        console.print("No rebuild is marked: nothing to clear.")
    else:
        print_line(
            f"Cleared the mark of the rebuild into generation {building}. If it still runs, it fails harmlessly."
        )


async def _run_rebuild(
    settings: Settings, *, take_over: bool, dry_run: bool, replay: RawReader | None = None, seed: int | None = None
) -> Rebuilt:
    tune_collector()
    token = uuid.uuid4().hex
    async with open_bucket(settings) as store, KafkaPublisher(settings, source="rebuild") as publisher:
        await publisher.check()
        with StepBars() as bars:
            job = Rebuild(store, publisher, token=token, report=bars.report, reader=replay, seed=seed)
            return await job.run(take_over=take_over, dry_run=dry_run)


def _print_rebuilt(rebuilt: Rebuilt, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json(rebuilt)
    else:
        _print_in_words(rebuilt, dry_run=dry_run)
    if rebuilt.refused is not None:
        raise typer.Exit(1)


def _print_in_words(rebuilt: Rebuilt, *, dry_run: bool) -> None:
    if rebuilt.changes:
        _records_of_changes(rebuilt).print(console)
    print_remark(
        f"Built generation {rebuilt.generation} from {rebuilt.events:,} events: {rebuilt.country_days:,} country-days, "
        f"{rebuilt.changes_total:,} of them differ from generation {rebuilt.live_before}."
    )
    if rebuilt.poison_records:
        print_remark(f"Skipped {rebuilt.poison_records:,} records of the topic that cannot be decoded.")
    if rebuilt.newer_records:
        print_remark(f"Skipped {rebuilt.newer_records:,} records of the topic that have a later schema version.")
    if rebuilt.refused is not None:
        print_remark(f"[red]Not made live:[/red] {printable(rebuilt.refused)}")
    elif dry_run:
        print_remark("Dry run: the new generation is deleted, and nothing has changed.")
    else:
        print_remark(
            f"It is live. Delete the old one when no reader uses it: 'tripfold generations drop {rebuilt.live_before}'."
        )


def _records_of_changes(rebuilt: Rebuilt) -> Records:
    records = Records("date", "country", "", "version", "trips", "passengers", "accidents", "delay ms", "cities", "why")
    for change in rebuilt.changes:
        why = "; ".join(change.why[:REASONS_MAX]) + (" …" if len(change.why) > REASONS_MAX else "")
        for name, side, reason in (("live", change.live, ""), ("built", change.built, why)):
            records.add(str(change.date), change.country, name, *_row_of(side), reason)
    return records


def _row_of(side: GenerationFigures | None) -> tuple[str, ...]:
    if side is None:
        return ("none", "", "", "", "", "")
    totals = side.totals
    numbers = (side.version, totals.trips, totals.passengers, totals.accidents, totals.delay_total_ms)
    return (*map(str, numbers), f"{side.cities_reported} of {side.cities_expected}")
