"""The commands of an operator: audit the summaries, make them again, clean up, look for what is wrong."""

from __future__ import annotations

import datetime as dt
import enum
from typing import Annotated

import typer

from tripfold.operate.recovery_commands import letters_commands, quarantine_commands, requests_commands

GRACE_S = 900

operate_commands = typer.Typer(no_args_is_help=True)
generations_commands = typer.Typer(help="The generations of summaries in the bucket.", no_args_is_help=True)
operate_commands.add_typer(generations_commands, name="generations")
operate_commands.add_typer(requests_commands, name="requests")
operate_commands.add_typer(quarantine_commands, name="quarantine")
operate_commands.add_typer(letters_commands, name="dead-letters")

_First = Annotated[dt.datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="The first date. Unset: all.")]
_Last = Annotated[dt.datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="The last date. Unset: all.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Build and compare, then delete what was built.")]
_TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Begin although another rebuild is marked; that one fails, without harm.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]


class Source(enum.Enum):
    """What a rebuild reads."""

    S3 = "s3"
    KAFKA = "kafka"


@operate_commands.command("verify")
def verify(
    first: _First = None,
    last: _Last = None,
    *,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every raw object again, with an independent parser.")
    ] = False,
    topics: Annotated[
        bool, typer.Option("--topics", help="Compare the compacted topics with the bucket, in place of the summaries.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Recompute every country-day from the bucket's manifests and plans; exit 1 if a live summary differs.

    With --topics: of each key of city-stats and country-day-summaries both the highest record and the last one must be
    what the bucket stands for.

    What is ahead may be on its way: it is looked at again for some seconds before it counts.

    Example: tripfold verify --from 2024-05-01 --to 2024-05-31 --deep

    Example: tripfold verify --topics
    """
    if topics:
        if deep:
            raise typer.BadParameter("--topics reads no raw objects: run --deep by itself", param_hint="--deep")
        from tripfold.operate import replay_terminal  # noqa: PLC0415  # loaded when it runs: quick --help

        replay_terminal.verify_topics(*_range(first, last), as_json=as_json)
        return
    from tripfold.operate import terminal  # noqa: PLC0415  # as above

    terminal.verify(*_range(first, last), deep=deep, as_json=as_json)


@operate_commands.command("repair")
def repair(
    first: _First = None,
    last: _Last = None,
    *,
    drop_lost: Annotated[
        bool,
        typer.Option(
            "--drop-lost", help="Also make summaries again that lose a city or their plan, for its object is lost."
        ),
    ] = False,
    as_json: _Json = False,
) -> None:
    """Make again, from manifests and plans, every live summary that verify finds wrong; exit 1 if one cannot be.

    Example: tripfold repair --from 2024-05-01 --to 2024-05-31
    """
    from tripfold.operate import terminal  # noqa: PLC0415  # as above

    terminal.repair(*_range(first, last), drop_lost=drop_lost, as_json=as_json)


@operate_commands.command("republish")
def republish(first: _First = None, last: _Last = None, *, as_json: _Json = False) -> None:
    """Publish plans, manifests and live summaries of a range of dates to the compacted topics again.

    Publishing twice is harmless: consumers keep the highest revision. Broken off, it says where to continue. Exit 1 if
    an object cannot be read.

    Example: tripfold republish --from 2024-05-01 --to 2024-05-31
    """
    from tripfold.operate import replay_terminal  # noqa: PLC0415  # as above

    replay_terminal.republish_dates(*_range(first, last), as_json=as_json)


@operate_commands.command("reprocess")
def reprocess(
    first: _First = None,
    last: _Last = None,
    *,
    country: Annotated[str | None, typer.Option(help="Only this country, by its slug.")] = None,
    city: Annotated[str | None, typer.Option(help="Only this city, by its id.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also files of which the present rules should make the same.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read, and say what would change.")] = False,
    as_json: _Json = False,
) -> None:
    """Read stored raw objects again that other parsing rules have read; exit 1 if one cannot be.

    Rules are other if this build, or the settings TRIPFOLD_INGEST_*, would make something else of the file. Each such
    file becomes a new revision and is published, as if it had been ingested again, but without the upstream. Services
    go on meanwhile. Ended at any moment and started again, it goes on where it stopped.

    Example: tripfold reprocess --from 2024-05-01 --to 2024-05-31 --dry-run

    Example: tripfold reprocess --country armenia --city 7
    """
    from tripfold.operate import replay_terminal  # noqa: PLC0415  # as above

    replay_terminal.reprocess(
        *_range(first, last), country=country, city=city, again=again, dry_run=dry_run, as_json=as_json
    )


@operate_commands.command("restore")
def restore(
    *,
    base: Annotated[
        int | None, typer.Option(min=1, help="The new base. Unset: just above what the topic city-stats knows.")
    ] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Take the present time as the base, as of a new bucket: with Kafka lost, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: _Json = False,
) -> None:
    """Raise the base of the bucket's revisions, after a backup of the bucket was put back.

    Run it while no service runs. The next revision of every city-day and plan is then above all that the topic knows,
    and those that the topic knows better than the bucket get such a revision at once. Exit 1 if one could not.

    Example: tripfold restore

    Example: tripfold restore --now
    """
    if now and base is not None:
        raise typer.BadParameter("give --base or --now, not both", param_hint="--now")
    from tripfold.operate import replay_terminal  # noqa: PLC0415  # as above

    replay_terminal.restore(base=base, now=now, dry_run=dry_run, as_json=as_json)


@operate_commands.command("rebuild")
def rebuild(
    *,
    source: Annotated[
        Source | None,
        typer.Option("--from", help="s3: plans and manifests. kafka: the topic city-stats, then plans and manifests."),
    ] = None,
    dry_run: _DryRun = False,
    take_over: _TakeOver = False,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="Build nothing: clear the mark of a rebuild that died.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Build a generation of all summaries beside the live one, compare the two, and make it live.

    Services go on meanwhile. Exit 1 if the generation was refused: something in it would be older than what is live.
    From s3, the compacted topics are then filled again, as after a loss of Kafka.

    A killed rebuild has changed nothing that is served, but its mark stays and refuses the next one: start that with
    --take-over, or clear the mark with --abandon.

    Example: tripfold rebuild --from s3 --dry-run

    Example: tripfold rebuild --from kafka --json > differences.json

    Example: tripfold rebuild --abandon
    """
    from tripfold.operate import terminal  # noqa: PLC0415  # as above

    if abandon:
        if source is not None or dry_run or take_over or as_json:
            raise typer.BadParameter("it is used alone: it builds nothing", param_hint="--abandon")
        terminal.abandon_rebuild()
        return
    if source is None:
        raise typer.BadParameter("give s3 or kafka", param_hint="--from")
    terminal.rebuild(from_kafka=source is Source.KAFKA, dry_run=dry_run, take_over=take_over, as_json=as_json)


@generations_commands.command("list")
def generations_list(*, as_json: _Json = False) -> None:
    """Show the generations of summaries, and which one is live or being built.

    Example: tripfold generations list
    """
    from tripfold.operate import terminal  # noqa: PLC0415  # as above

    terminal.list_all(as_json=as_json)


@generations_commands.command("drop")
def generations_drop(
    number: Annotated[int, typer.Argument(min=1)],
    grace_s: Annotated[
        int, typer.Option(min=0, help="How long the pointer must have stood, so that nobody still reads the old one.")
    ] = GRACE_S,
) -> None:
    """Delete the summaries of an old generation.

    Example: tripfold generations drop 1
    """
    from tripfold.operate import terminal  # noqa: PLC0415  # as above

    terminal.drop_one(number, grace_s=grace_s)


@generations_commands.command("activate")
def generations_activate(
    number: Annotated[int, typer.Argument(min=1)],
    *,
    dry_run: _DryRun = False,
    take_over: _TakeOver = False,
    as_json: _Json = False,
) -> None:
    """Make a generation that begins with the summaries of an old one, joined with plans and manifests, the live one.

    Example: tripfold generations activate 1
    """
    from tripfold.operate import terminal  # noqa: PLC0415  # as above

    terminal.activate(number, dry_run=dry_run, take_over=take_over, as_json=as_json)


@operate_commands.command("gc")
def gc(
    *,
    older_than: Annotated[
        str, typer.Option(help="Only what is older, by the store's clock: a number and s, m, h or d.")
    ] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted.")] = False,
    as_json: _Json = False,
) -> None:
    """Delete raw attempts that no manifest names, now or in its history, uploads that were never ended, old quarantine.

    Files in quarantine have an age of their own, TRIPFOLD_QUARANTINE_DAYS.

    Example: tripfold gc --older-than 14d --dry-run
    """
    from tripfold.operate import terminal  # noqa: PLC0415  # as above

    terminal.gc(older_than=older_than, dry_run=dry_run, as_json=as_json)


@operate_commands.command("skip")
def skip(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="A topic that a service consumes, such as city-stats.")],
    partition: Annotated[int, typer.Argument(metavar="PARTITION", min=0)],
    offset: Annotated[int, typer.Argument(metavar="OFFSET", min=0)],
) -> None:
    """Move a record of a later schema version, which blocks its consumer, to the dead letters.

    The services go on running. Readiness, the log and 'tripfold doctor' name the record that blocks a consumer. Upgrade
    instead if you can: what was skipped counts nowhere until 'tripfold dead-letters retry' sends it back.

    Example: tripfold skip city-stats 3 17
    """
    from tripfold.operate import skipping  # noqa: PLC0415  # as above

    skipping.skip(topic, partition, offset)


@operate_commands.command("doctor")
def doctor(*, as_json: _Json = False) -> None:
    """Examine S3 (does it really compare and swap?), Kafka, topics, upstream and lineage; exit 1 if any is at fault.

    Example: tripfold doctor
    """
    from tripfold.operate import terminal  # noqa: PLC0415  # as above

    terminal.doctor(as_json=as_json)


def _range(first: dt.datetime | None, last: dt.datetime | None) -> tuple[dt.date | None, dt.date | None]:
    if first and last and first > last:
        raise typer.BadParameter(f"{first.date()} is after {last.date()}", param_hint="--from")
    return first.date() if first else None, last.date() if last else None
