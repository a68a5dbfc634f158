"""Mends unreadable objects, and replaces the live summaries that verify finds wrong."""

from __future__ import annotations

from typing import Annotated

import typer

from services.aggregate.audit.compare import Difference
from services.aggregate.audit.mend import Mended, mend_objects
from services.aggregate.audit.repair import Repaired, repair_dates
from services.aggregate.bucket_reader import Dates
from shared.domain.ids import utc_now
from shared.kafka.producer import KafkaPublisher
from tripfold.console import Records, print_remark, printable
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
    print_line,
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
    """Mend unreadable objects, and replace every live summary that verify finds wrong; exit 1 if one is refused.

    The new summary comes from manifests and plans, and is published. An unreadable plan or manifest is removed, and its
    date has to be requested again. The bytes of unreadable objects are kept under damaged/.

    Example: tripfold repair --from 2024-05-01 --to 2024-05-31
    """
    dates = Dates(*date_range(first, last))
    settings = command_settings()

    async def run() -> tuple[int, int, list[Repaired], list[Mended]]:
        total = refused = 0
        kept: list[Repaired] = []
        async with open_bucket(settings) as store, KafkaPublisher(settings, source="repair") as publisher:
            await publisher.check()
            mended = [one async for one in mend_objects(store, dates, utc_now)]
            with progress_bar("repairing", "dates") as show:
                async for one in repair_dates(
                    store, publisher, dates, wait=wait_before_comparison, clock=utc_now, drop_lost=drop_lost
                ):
                    mended += one.mended
                    total += len(one.country_days)
                    refused += sum(repaired.refused is not None for repaired in one.country_days)
                    kept += one.country_days[: JSON_ITEMS_MAX - len(kept)]
                    show(one.dates_done, one.dates_total)
        return total, refused, kept, mended

    total, refused, kept, mended = run_command(run())
    if as_json:
        print_json({"repaired": total - refused, "refused": refused, "country_days": kept, "mended": mended})
    else:
        _print(kept, mended, repaired=total - refused, refused=refused)
    if refused:
        raise typer.Exit(1)


def _print(kept: list[Repaired], mended: list[Mended], *, repaired: int, refused: int) -> None:
    for object_ in mended:
        print_line(printable(f"{object_.fault}. Now {object_.done}"))
    if kept:
        records = Records("date", "country", "version before", "version", "what was wrong", whole={"date", "country"})
        for one in kept:
            version = str(one.version_after) if one.refused is None else f"not repaired: {one.refused}"
            wrong = "; ".join(_sentence_of(difference) for difference in one.differences[:REASONS_MAX])
            records.add(str(one.date), one.country, str(one.version_before), version, wrong)
        records.print(console)
        print_remark(f"Summaries repaired: {repaired:,}; refused: {refused:,}.")
    elif not mended:
        print_remark("Nothing to repair.")


def _sentence_of(difference: Difference) -> str:
    where = f"city {difference.city_id}: " if difference.city_id else ""
    return f"{where}{difference.what} {difference.found}, expected {difference.expected}"
