"""Lists and shows the files in quarantine, and requests them again."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
import typer

from shared.domain import bitmap, keys
from shared.domain.errors import OperatorError
from shared.domain.events import ProcessRequested
from shared.domain.ids import CityId, RequestId, utc_now
from shared.domain.objects import QuarantineReport, RequestRecord
from shared.domain.requests import NothingToRetry
from shared.kafka.producer import KafkaPublisher, Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository, read_plan
from tripfold.console import printable
from tripfold.operate.command_line import (
    TABLE_ROWS_MAX,
    AsJson,
    FirstDate,
    LastDate,
    command_settings,
    console,
    date_range,
    make_table,
    open_bucket,
    print_json,
    print_line,
    run_command,
)
from tripfold.operate.requests import UnknownRequest, read_request, retry_request

GETS_AT_ONCE_MAX = 16
REPORTS_MAX = 100_000
"""The most reports that one command reads."""
SHOWN_LENGTH_MAX = 300

quarantine_commands = typer.Typer(
    help="Quarantine: files that were refused as a whole, and why.", no_args_is_help=True, add_completion=False
)

_Country = Annotated[str | None, typer.Option(metavar="SLUG", help="Only files of this country.")]
_City = Annotated[str | None, typer.Option(metavar="ID", help="Only files of this city, by its id as keys have it.")]


class NothingQuarantined(OperatorError):
    """There is no such file in quarantine."""


class QuarantineFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Selects files by their dates (both included), country slug and city."""

    first: dt.date | None = None
    last: dt.date | None = None
    country: str | None = None
    city_id: str | None = None

    def matches(self, key: str) -> bool:
        """Return whether a report's key has a selected date and city."""
        date = keys.parse_date(key)
        return (
            date is not None
            and (self.first is None or date >= self.first)
            and (self.last is None or date <= self.last)
            and (self.city_id is None or f"/city={self.city_id}/" in key)
        )


class QuarantineRetry(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a retry: the published requests, the retried city-days, and those that need no retry."""

    requests: tuple[ProcessRequested, ...]
    asked: tuple[QuarantineReport, ...]
    settled: tuple[QuarantineReport, ...]


@quarantine_commands.command("list")
def list_command(
    first: FirstDate = None,
    last: LastDate = None,
    country: _Country = None,
    city: _City = None,
    *,
    as_json: AsJson = False,
) -> None:
    """List the files in quarantine: city-day, size, bad records and reason.

    Example: tripfold quarantine list --from 2024-05-01 --to 2024-05-31 --country armenia
    """
    settings = command_settings()
    first_date, last_date = date_range(first, last)
    selection = QuarantineFilter(first=first_date, last=last_date, country=country, city_id=city)

    async def read() -> list[QuarantineReport]:
        async with open_bucket(settings) as store:
            return await read_reports(store, selection)

    found = run_command(read())
    if as_json:
        print_json(found)
        return
    headings = ("date", "country", "city", "name", "bytes", "bad records", "reason", "refused (UTC)", "seen")
    table = make_table(*headings, whole={"date"})
    for one in found[:TABLE_ROWS_MAX]:
        row = (one.country, one.city_id, one.city_name, f"{one.size_bytes:,}", str(one.bad_records), one.reason)
        shown = (printable(text, length_max=SHOWN_LENGTH_MAX) for text in row)
        table.add_row(str(one.date), *shown, f"{one.quarantined_at:%Y-%m-%d %H:%M}", str(one.seen))
    console.print(table)
    console.print(f"{len(found):,} files in quarantine. See one: 'tripfold quarantine show DATE CITY'.")


@quarantine_commands.command("show")
def show_command(
    date: Annotated[dt.datetime, typer.Argument(metavar="DATE", formats=["%Y-%m-%d"], help="The file's date.")],
    city: Annotated[str, typer.Argument(metavar="CITY", help="The city's id, as in the list.")],
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all reports on the city-day, not only the latest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the report on a refused file: its source, its key in the bucket, and every reported record.

    Example: tripfold quarantine show 2024-05-01 7
    """
    settings = command_settings()

    async def read() -> list[QuarantineReport]:
        async with open_bucket(settings) as store:
            return await read_city_day(store, date.date(), city)

    found = run_command(read())
    shown = found if everything else found[:1]
    if as_json:
        print_json(shown if everything else shown[0])
        return
    for report in shown:
        _print_report(report)
    if len(found) > len(shown):
        console.print(f"{len(found):,} files of this city-day are in quarantine. See all: --all.")


@quarantine_commands.command("retry")
def retry_command(
    date: Annotated[
        dt.datetime | None, typer.Argument(metavar="[DATE]", formats=["%Y-%m-%d"], help="The files' date.")
    ] = None,
    city: Annotated[str | None, typer.Argument(metavar="[CITY]", help="The city's id. Default: all of DATE.")] = None,
    first: FirstDate = None,
    last: LastDate = None,
    country: _Country = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Request refused files again: only these city-days, each in the request that last asked for it.

    Example: tripfold quarantine retry 2024-05-01 7

    Example: tripfold quarantine retry --from 2024-05-01 --to 2024-05-31 --country armenia
    """
    if (date is None) == (first is None and last is None):
        raise typer.BadParameter("give a date, or --from and --to", param_hint="DATE")
    first_date, last_date = (date.date(), date.date()) if date else date_range(first, last)
    selection = QuarantineFilter(first=first_date, last=last_date, country=country, city_id=city)
    settings = command_settings()

    async def retry() -> QuarantineRetry:
        async with open_bucket(settings) as store, KafkaPublisher(settings, source="retry") as publisher:
            reports = await read_reports(store, selection)
            if not reports:
                raise NothingQuarantined("no such file is in quarantine. List all: 'tripfold quarantine list'.")
            return await retry_reports(store, publisher, reports, clock=utc_now)

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
        print_line(f"Retrying {_city_day_of(one)} in request {one.last_request_id}.")
    for one in retried.settled:
        print_line(
            f"Skipped {_city_day_of(one)}: request {one.last_request_id} still runs, or it has not failed there."
        )


def _city_day_of(report: QuarantineReport) -> str:
    return printable(f"{report.date}, city {report.city_id} ({report.city_name})")


def _print_report(report: QuarantineReport) -> None:
    lines = {
        "city-day": f"{report.date}, city {report.city_id} ({report.city_name}), {report.country}",
        "reason": report.reason,
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
            print_line(f"[bold]{name:>11}[/bold]  {printable(text)}")
    if report.reported:
        table = make_table("record", "byte", "field", "value", "reason")
        for record in report.reported:
            place = (str(record.record_number), "" if record.byte_offset is None else str(record.byte_offset))
            table.add_row(*place, *map(printable, (record.field or "", record.value or "", record.reason)))
        if report.bad_records > len(report.reported):
            table.caption = f"the first {len(report.reported):,} of {report.bad_records:,}"
        console.print(table)


async def read_reports(store: ObjectStore, selection: QuarantineFilter) -> list[QuarantineReport]:
    """Return the selected reports by date and city, the latest of a city-day first."""
    found: list[str] = []
    prefix = (
        keys.quarantine_of_date(selection.first)
        if selection.first and selection.first == selection.last
        else keys.QUARANTINE
    )
    async for listed in store.list(prefix):
        if listed.key.endswith(keys.REPORT_SUFFIX) and selection.matches(listed.key):
            found.append(listed.key)
        if len(found) > REPORTS_MAX:
            raise OperatorError(f"more than {REPORTS_MAX:,} files are in quarantine: select some with --from and --to")

    repository = Repository(store)
    reports = await bounded_map(lambda key: repository.get(QuarantineReport, key), found, limit=GETS_AT_ONCE_MAX)
    wanted = [report for report in reports if report is not None and selection.country in {None, report.country}]
    return sorted(wanted, key=lambda report: (report.date, report.city_id, -report.quarantined_at.timestamp()))


async def read_city_day(store: ObjectStore, date: dt.date, city_id: str) -> list[QuarantineReport]:
    """Return the reports on a city-day, the latest first. Raises NothingQuarantined if there is none."""
    reports = await read_reports(store, QuarantineFilter(first=date, last=date, city_id=city_id))
    if not reports:
        where = f"city {city_id[:100]!r} on {date}"
        raise NothingQuarantined(f"no file of {where} is in quarantine. List all: 'tripfold quarantine list'.")
    return reports


async def retry_reports(
    store: ObjectStore,
    publisher: Publisher,
    reports: Sequence[QuarantineReport],
    *,
    clock: Callable[[], dt.datetime],
) -> QuarantineRetry:
    """Retry the city-days of reports, each as a failed city of the request that last asked for it.

    A city-day that is not a failed city of that request is settled: it was ingested since, or the request still runs.
    """
    by_request: dict[RequestId, list[QuarantineReport]] = {}
    for report in reports:
        by_request.setdefault(report.last_request_id, []).append(report)
    requested: list[ProcessRequested] = []
    asked: list[QuarantineReport] = []
    settled: list[QuarantineReport] = []
    for request_id, its_reports in by_request.items():
        try:
            record = await read_request(store, request_id)
            positions = await _positions(store, record, {report.city_id for report in its_reports})
            requested.append(await retry_request(store, request_id, clock(), positions=positions))
        except (NothingToRetry, UnknownRequest):
            settled += its_reports
        else:
            asked += its_reports
    await publisher.publish(map(OutgoingEvent, requested))
    return QuarantineRetry(requests=tuple(requested), asked=tuple(asked), settled=tuple(settled))


async def _positions(store: ObjectStore, record: RequestRecord, city_ids: set[CityId]) -> int | None:
    """Return the positions of cities in the plan of a request, as a bitmap; None, for all, if the plan has changed."""
    plan = await read_plan(store, record.date)
    if plan is None or plan.revision != record.plan_revision:
        return None
    planned = (city.city_id for country in plan.countries.values() for city in country.cities)
    positions = 0
    for position, city_id in enumerate(planned):
        if city_id in city_ids:
            positions |= bitmap.member(position)
    return positions
