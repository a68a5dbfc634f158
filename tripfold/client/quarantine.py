"""The commands for files in quarantine: they use the Python client."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer
from tripfold_client import QuarantinedFile

from tripfold.client.session import API_URL, ApiKey, ApiUnusable, ApiUrl, open_api, print_unreadable
from tripfold.console import Records, open_console, print_remark, printable

SHOWN_LENGTH_MAX = 300

quarantine_commands = typer.Typer(
    help="Quarantine: files that were refused as a whole, and why.", no_args_is_help=True, add_completion=False
)

_First = Annotated[
    dt.datetime | None,
    typer.Option(
        "--from", metavar="DATE", formats=["%Y-%m-%d"], help="The first date. Default, also of --to: all dates."
    ),
]
_Last = Annotated[
    dt.datetime | None, typer.Option("--to", metavar="DATE", formats=["%Y-%m-%d"], help="The last date, included.")
]
_Country = Annotated[str | None, typer.Option(metavar="SLUG", help="Only files of this country.")]
_City = Annotated[str | None, typer.Option(metavar="ID", help="Only files of this city, by its id in the list.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@quarantine_commands.command("list")
def list_command(
    first: _First = None,
    last: _Last = None,
    country: _Country = None,
    city: _City = None,
    *,
    as_json: _AsJson = False,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """List the files in quarantine: city-day, size, bad records and reason.

    Example: tripfold quarantine list --from 2024-05-01 --to 2024-05-31 --country armenia
    """
    with open_api(api, key) as client:
        found = client.quarantine(_date(first), _date(last), country=country, city=city, detail=as_json)
    _print_files(found.files, as_json=as_json)
    for unreadable in found.unreadable:
        print_unreadable(unreadable)
    if found.total > len(found.files) + len(found.unreadable):
        print_remark(f"The first {len(found.files):,} are shown. Select fewer with --from and --to.")
    files = "file" if found.total == 1 else "files"
    if not as_json:
        print_remark(f"{found.total:,} {files} in quarantine. See one: 'tripfold quarantine show DATE CITY'.")


def _print_files(files: Sequence[QuarantinedFile], *, as_json: bool) -> None:
    if as_json:
        _print_json(files)
        return
    records = Records(
        *("date", "country", "city", "name", "bytes", "bad records", "reason", "refused (UTC)", "seen"),
        whole={"date"},
        length_max=SHOWN_LENGTH_MAX,
    )
    for one in files:
        who = (str(one.date), one.country, one.city_id, one.city_name)
        refused = f"{one.quarantined_at:%Y-%m-%d %H:%M}"
        records.add(*who, one.size_bytes, one.bad_records, one.reason, refused, one.seen)
    records.print(open_console())


@quarantine_commands.command("show")
def show_command(
    date: Annotated[dt.datetime, typer.Argument(metavar="DATE", formats=["%Y-%m-%d"], help="The file's date.")],
    city: Annotated[str, typer.Argument(metavar="CITY", help="The city's id, as in the list.")],
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all reports on the city-day, not only the latest.")
    ] = False,
    as_json: _AsJson = False,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """Show the report on a refused file: its source, its key in the bucket, and every reported record.

    Example: tripfold quarantine show 2024-05-01 7
    """
    with open_api(api, key) as client:
        files = client.quarantine(date.date(), date.date(), city=city, detail=True).files
    found = sorted(files, key=lambda one: one.quarantined_at, reverse=True)
    if not found:
        raise ApiUnusable(
            f"no file of city {city[:100]!r} on {date.date()} is in quarantine. List all: 'tripfold quarantine list'."
        )
    shown = found if everything else found[:1]
    if as_json:
        _print_json(shown if everything else shown[0])
        return
    for one in shown:
        _print_report(one)
    if len(found) > len(shown):
        print_remark(f"{len(found):,} files of this city-day are in quarantine. See all: --all.")


@quarantine_commands.command("retry")
def retry_command(
    date: Annotated[
        dt.datetime | None, typer.Argument(metavar="[DATE]", formats=["%Y-%m-%d"], help="The files' date.")
    ] = None,
    city: Annotated[str | None, typer.Argument(metavar="[CITY]", help="The city's id. Default: all of DATE.")] = None,
    first: _First = None,
    last: _Last = None,
    country: _Country = None,
    *,
    as_json: _AsJson = False,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """Request refused files again: only these city-days, each in the request that last asked for it.

    Example: tripfold quarantine retry 2024-05-01 7

    Example: tripfold quarantine retry --from 2024-05-01 --to 2024-05-31 --country armenia
    """
    if (date is None) == (first is None and last is None):
        raise typer.BadParameter("give a date, or --from and --to", param_hint="DATE")
    begin, end = _date(date or first), _date(date or last)
    with open_api(api, key) as client:
        result = client.retry_quarantined(begin, end, country=country, city=city)
    if as_json:
        _print_json(result)
        return
    console = open_console()
    for one in result.retried:
        text = f"Retrying {one.date}, city {one.city_id} ({one.city_name}) in request {one.request_id}."
        console.print(printable(text), highlight=False, soft_wrap=True)
    for one in result.skipped:
        text = f"Skipped {one.date}, city {one.city_id} ({one.city_name}): "
        text += f"request {one.request_id} still runs, or it has not failed there."
        console.print(printable(text), highlight=False, soft_wrap=True)
    for unreadable in result.unreadable:
        print_unreadable(unreadable)


def _date(value: dt.datetime | None) -> dt.date | None:
    return None if value is None else value.date()


def _print_json(value: Any) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value)))


def _print_report(one: QuarantinedFile) -> None:
    console = open_console()
    lines = {
        "city-day": f"{one.date}, city {one.city_id} ({one.city_name}), {one.country}",
        "reason": one.reason,
        "cut off": one.broke_off or "",
        "bad records": f"{one.bad_records:,}" + (f" of {one.records:,}" if one.records is not None else ""),
        "file": f"{one.key}, {one.size_bytes:,} bytes",
        "sha256": one.sha256,
        "upstream": one.upstream_url,
        "validators": ", ".join(filter(None, (one.etag, one.last_modified))),
        "refused": f"{one.quarantined_at:%Y-%m-%d %H:%M:%S} UTC, request {one.request_id}",
        "seen": f"{one.seen} times, last {one.last_seen_at:%Y-%m-%d %H:%M:%S} UTC, by {one.last_request_id}",
    }
    for name, text in lines.items():
        if text:
            console.print(f"[bold]{name:>11}[/bold]  {printable(text)}", highlight=False, soft_wrap=True)
    if one.reported:
        records = Records("record", "byte", "field", "value", "reason")
        for bad in one.reported:
            byte = "" if bad.byte_offset is None else bad.byte_offset
            records.add(bad.record_number, byte, bad.field or "", bad.value or "", bad.reason)
        records.print(console)
        if one.bad_records > len(one.reported):
            print_remark(f"The first {len(one.reported):,} of {one.bad_records:,} bad records.")
