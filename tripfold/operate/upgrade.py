"""Ends an upgrade: every process writes the schema version of the new build, and readers trust the change index."""

from __future__ import annotations

from typing import Annotated

import typer
from msgspec import UNSET

from shared.domain import schema
from shared.storage.generation_pointer import read_current, trust_change_counters
from shared.storage.s3 import S3Store
from shared.storage.schema_switch import finalize_upgrade, read_written_version
from tripfold.operate.command_line import AsJson, command_settings, print_json, print_line, run_command

upgrade_commands = typer.Typer(
    help="The schema version that every process writes.", no_args_is_help=True, add_completion=False
)


@upgrade_commands.callback()
def upgrade_group() -> None:
    """Keep the name of the only command: Typer would make it the group itself."""


@upgrade_commands.command("finalize")
def finalize_command(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the versions, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let every process write the schema version of this build. Run it when all processes run this build.

    Until then they write the version before, and you can go back to the build before. Afterwards you cannot: a process
    of that build does not become ready. The API trusts the change index from then on, so an unchanged query lists no
    summaries. Running processes follow within seconds. Safe to run again.

    Example: tripfold upgrade finalize --dry-run
    """
    settings = command_settings()

    async def run() -> tuple[int, bool]:
        async with S3Store(settings) as store:
            before = await (read_written_version if dry_run else finalize_upgrade)(store)
            trusted = (await read_current(store)).changes_counted_since is not UNSET
            if not dry_run:
                await trust_change_counters(store)
            return before, trusted

    before, trusted = run_command(run())
    after = before if dry_run else schema.SCHEMA_VERSION
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "written_before": before,
                "written": after,
                "known": schema.SCHEMA_VERSION,
                "change_index_before": trusted,
                "change_index": trusted or not dry_run,
            }
        )
        return
    if not trusted:
        print_line(f"The API {'would trust' if dry_run else 'trusts'} the change index from now on.")
    if before == schema.SCHEMA_VERSION:
        print_line(f"Schema version {before} is written, the latest of this build: nothing to do.")
    elif dry_run:
        print_line(f"Schema version {before} is written. This command would change it to {schema.SCHEMA_VERSION}.")
    else:
        print_line(f"Schema version {after} is written from now on; it was {before}. The build before cannot return.")
