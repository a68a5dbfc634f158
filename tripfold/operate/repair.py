"""Replaces the live summaries that verify finds wrong by those that manifests and plans give."""

from __future__ import annotations

from typing import Annotated

import typer

from services.aggregate.audit.compare import Difference
from services.aggregate.audit.repair import Repaired, repair_dates
from services.aggregate.bucket_reader import Dates
from shared.kafka.producer import KafkaPublisher
from tripfold.console import Records, print_remark
from tripfold.operate.command_line import (
    JSON_ITEMS_MAX,
    AsJson,
    FirstDate,
    LastDate,
    command_settings,
    console,
    date_range,
    open_bucket,
    print_json,
    progress_bar,
    run_command,
    wait_before_comparison,
)

REASONS_MAX = 3


def repair_command(
    first: FirstDate = None,
    last: LastDate = None,
    *,
    drop_lost: Annotated[
        bool,
        typer.Option(
            "--drop-lost", help="Also repair summaries that lose a city or their plan, as its object is lost."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replace every live summary that verify finds wrong; exit 1 if one is refused.

    The new summary comes from manifests and plans, and is published.

    Example: tripfold repair --from 2024-05-01 --to 2024-05-31
    """
    dates = Dates(*date_range(first, last))
    settings = command_settings()

    async def run() -> tuple[int, int, list[Repaired]]:
        total = refused = 0
        kept: list[Repaired] = []
        async with open_bucket(settings) as store, KafkaPublisher(settings, source="repair") as publisher:
            await publisher.check()
            with progress_bar("repairing", "dates") as show:
                async for one in repair_dates(
                    store, publisher, dates, wait=wait_before_comparison, drop_lost=drop_lost
                ):
                    total += len(one.country_days)
                    refused += sum(repaired.refused is not None for repaired in one.country_days)
                    kept += one.country_days[: JSON_ITEMS_MAX - len(kept)]
                    show(one.dates_done, one.dates_total)
        return total, refused, kept

    total, refused, kept = run_command(run())
    if as_json:
        print_json({"repaired": total - refused, "refused": refused, "country_days": kept})
    elif kept:
        records = Records("date", "country", "version before", "version", "what was wrong", whole={"date", "country"})
        for one in kept:
            version = str(one.version_after) if one.refused is None else f"not repaired: {one.refused}"
            wrong = "; ".join(_sentence_of(difference) for difference in one.differences[:REASONS_MAX])
            records.add(str(one.date), one.country, str(one.version_before), version, wrong)
        records.print(console)
        print_remark(f"Summaries repaired: {total - refused:,}; refused: {refused:,}.")
    else:
        print_remark("Nothing to repair.")
    if refused:
        raise typer.Exit(1)


def _sentence_of(difference: Difference) -> str:
    where = f"city {difference.city_id}: " if difference.city_id else ""
    return f"{where}{difference.what} {difference.found}, expected {difference.expected}"
