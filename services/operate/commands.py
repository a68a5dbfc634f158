"""The commands of an operator: audit the summaries, make them again, clean up, look for what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import Coroutine, Iterable
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from services.aggregate.bucket import Dates
from services.aggregate.repairing import Repaired, repair_dates
from services.aggregate.verify import Difference
from services.aggregate.verifying import verify_dates
from shared.errors import OperatorError
from shared.health import configure_logging
from shared.objects import CorruptObject
from shared.publishing import KafkaPublisher
from shared.settings import Settings, load_settings
from shared.store import S3Store

LINES_MAX = 1_000

operate_commands = typer.Typer(no_args_is_help=True)
console = Console()
progress_console = Console(stderr=True)  # so that what is printed can be piped

_Result = TypeVar("_Result")
_Date = Annotated[dt.datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="The first date. Unset: all.")]
_Last = Annotated[dt.datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="The last date. Unset: all.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]


@operate_commands.command("verify")
def verify(
    first: _Date = None,
    last: _Last = None,
    deep: Annotated[bool, typer.Option(help="Also read every raw object again, with an independent parser.")] = False,
    as_json: _Json = False,
) -> None:
    """Recompute every country-day from the bucket's manifests and plans; exit 1 if a live summary differs.

    A manifest ahead of its summary may be on its way: it is looked at again for some seconds before it counts.

    Example: tripfold verify --from 2024-05-01 --to 2024-05-31 --deep
    """
    settings = _settings()

    async def run() -> tuple[int, int, list[Difference]]:
        dates = country_days = 0
        told: list[Difference] = []
        async with S3Store(settings) as store:
            with _bar("verifying", "dates") as show:
                async for verified in verify_dates(store, _dates(first, last), deep=deep, wait=_wait):
                    dates += 1
                    country_days += verified.country_days
                    told += verified.differences
                    show(verified.dates_done, verified.dates_total)
        return dates, country_days, told

    dates, country_days, told = _run(run())
    if as_json:
        _print_json({"dates": dates, "country_days": country_days, "differences": told})
    elif told:
        console.print(_table_of(told))
        console.print(
            f"{len(told)} differences in {country_days} country-days; 'tripfold repair' makes summaries again"
        )
    else:
        console.print(f"{country_days} country-days of {dates} dates are as the manifests say")
    if told:
        raise typer.Exit(1)


@operate_commands.command("repair")
def repair(first: _Date = None, last: _Last = None, as_json: _Json = False) -> None:
    """Make again, from manifests and plans, every live summary that verify finds wrong; exit 1 if one cannot be.

    Example: tripfold repair --from 2024-05-01 --to 2024-05-31
    """
    settings = _settings()

    async def run() -> list[Repaired]:
        done: list[Repaired] = []
        async with S3Store(settings) as store, KafkaPublisher(settings, source="repair") as publisher:
            await publisher.check()
            with _bar("repairing", "dates") as show:
                async for repaired in repair_dates(store, publisher, _dates(first, last), wait=_wait):
                    done += repaired.country_days
                    show(repaired.dates_done, repaired.dates_total)
        return done

    done = _run(run())
    if as_json:
        _print_json(done)
    elif done:
        table = Table("date", "country", "version before", "version", "what was wrong")
        for one in done[:LINES_MAX]:
            version = str(one.version_after) if one.refused is None else f"not repaired: {one.refused}"
            wrong = "; ".join(_sentence_of(difference) for difference in one.differences[:3])
            table.add_row(str(one.date), one.country, str(one.version_before), version, wrong)
        console.print(table)
    else:
        console.print("nothing to repair")
    if any(one.refused is not None for one in done):
        raise typer.Exit(1)


def _dates(first: dt.datetime | None, last: dt.datetime | None) -> Dates:
    dates = Dates(first.date() if first else None, last.date() if last else None)
    if dates.first and dates.last and dates.first > dates.last:
        raise typer.BadParameter(f"{dates.first} is after {dates.last}", param_hint="--from")
    return dates


async def _wait(look: int) -> None:
    await asyncio.sleep(0.5 * look)


@contextlib.contextmanager
def _bar(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar; give a function that takes how much is done, of how much, and a remark."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}{{task.fields[remark]}}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress_console, transient=True) as progress:
        task = progress.add_task(what, total=None, remark="")

        def show(done: int, total: int, remark: str = "") -> None:
            progress.update(task, completed=done, total=total, remark=remark)

        yield show


def _table_of(differences: Iterable[Difference]) -> Table:
    table = Table("date", "country", "city", "what", "found", "expected")
    for number, one in enumerate(differences):
        if number == LINES_MAX:
            table.caption = f"the first {LINES_MAX} of more; --json prints all"
            break
        found = f"{one.found} (still in flight)" if one.in_flight else one.found
        table.add_row(str(one.date), one.country, one.city_id or "", one.what, found, one.expected)
    return table


def _sentence_of(difference: Difference) -> str:
    where = f"city {difference.city_id}: " if difference.city_id else ""
    return f"{where}{difference.what} {difference.found}, expected {difference.expected}"


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value)))


def _settings() -> Settings:
    settings = load_settings()
    configure_logging(settings)
    return settings


def _run(work: Coroutine[Any, Any, _Result]) -> _Result:
    try:
        return asyncio.run(work)
    except CorruptObject as error:
        raise OperatorError(str(error)) from error
