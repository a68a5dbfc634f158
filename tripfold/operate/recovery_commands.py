"""The commands for what failed (requests, files in quarantine, dead letters): see it, and take it up again."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

requests_commands = typer.Typer(help="Requests: how far they have come, and their failed cities.", no_args_is_help=True)
quarantine_commands = typer.Typer(help="Files that were refused as a whole, and why.", no_args_is_help=True)
letters_commands = typer.Typer(
    help="Dead letters: records that could not be processed, as they came.", no_args_is_help=True
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]
_First = Annotated[dt.datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="The first day. Unset: all.")]
_Last = Annotated[dt.datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="The last day. Unset: all.")]
_OriginTopic = Annotated[
    str | None, typer.Option("--topic", help="Only those that came from this topic, such as city-tasks.")
]
_Depth = Annotated[
    int, typer.Option("--depth", min=1, max=10_000_000, help="How many records of each partition are looked at.")
]
_Country = Annotated[str | None, typer.Option(help="Only of this country, by its slug.")]
_City = Annotated[str | None, typer.Option(help="Only of this city, by its id as keys have it.")]
_Date = Annotated[dt.datetime, typer.Argument(metavar="DATE", formats=["%Y-%m-%d"], help="The file's date.")]
_RequestId = Annotated[str, typer.Argument(metavar="ID", help="The request's id.")]


@requests_commands.command("list")
def requests_list(
    *,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="How many are shown at most.")] = 20,
    as_json: _Json = False,
) -> None:
    """Show the latest requests, the latest first.

    Example: tripfold requests list --limit 50
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # loaded when it runs: quick --help

    terminal.list_requests(limit=limit, as_json=as_json)


@requests_commands.command("show")
def requests_show(request_id: _RequestId, *, as_json: _Json = False) -> None:
    """Show one request, and every failure with its reason.

    Example: tripfold requests show 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    terminal.show_request(request_id, as_json=as_json)


@requests_commands.command("retry")
def requests_retry(
    request_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The requests' ids.")],
    *,
    as_json: _Json = False,
) -> None:
    """Take up the failed cities of requests again, and only those, each request under its own id.

    A city that now succeeds turns "completed with failures" into "completed" once it was the last one. If the date's
    plan has changed since, all its cities are taken up: what has not changed upstream costs no download.

    Example: tripfold requests retry 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    terminal.retry_requests(request_ids, as_json=as_json)


@quarantine_commands.command("list")
def quarantine_list(
    first: _First = None,
    last: _Last = None,
    country: _Country = None,
    city: _City = None,
    *,
    as_json: _Json = False,
) -> None:
    """Show the files in quarantine: city-day, size, bad records and the first fault of each.

    Example: tripfold quarantine list --from 2024-05-01 --to 2024-05-31 --country armenia
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    terminal.list_quarantined(*_days(first, last), country=country, city_id=city, as_json=as_json)


@quarantine_commands.command("show")
def quarantine_show(
    date: _Date,
    city: Annotated[str, typer.Argument(metavar="CITY", help="The city's id, as the list shows it.")],
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="All reports on the city-day, not the latest alone.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Show the report on a refused file: where it came from, where it lies, and every reported record.

    Example: tripfold quarantine show 2024-05-01 7
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    terminal.show_quarantined(date.date(), city, everything=everything, as_json=as_json)


@quarantine_commands.command("retry")
def quarantine_retry(
    date: Annotated[
        dt.datetime | None, typer.Argument(metavar="[DATE]", formats=["%Y-%m-%d"], help="The file's date.")
    ] = None,
    city_argument: Annotated[str | None, typer.Argument(metavar="[CITY]", help="The city. Unset: all of DATE.")] = None,
    first: _First = None,
    last: _Last = None,
    country: _Country = None,
    *,
    as_json: _Json = False,
) -> None:
    """Ask for refused files once more: those city-days alone, in the requests that last asked for them.

    Example: tripfold quarantine retry 2024-05-01 7
    Example: tripfold quarantine retry --from 2024-05-01 --to 2024-05-31 --country armenia
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    if (date is None) == (first is None and last is None):
        raise typer.BadParameter("name a date, or choose dates with --from and --to", param_hint="DATE")
    days = (date.date(), date.date()) if date else _days(first, last)
    terminal.retry_quarantined(*days, country=country, city_id=city_argument, as_json=as_json)


@letters_commands.command("list")
def letters_list(
    first: _First = None,
    last: _Last = None,
    topic: _OriginTopic = None,
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many are shown at most.")] = 50,
    depth: _Depth = 100_000,
    as_json: _Json = False,
) -> None:
    """Show dead letters, the latest first: where each came from and why it could not be processed.

    Example: tripfold dead-letters list --topic city-stats --from 2024-05-01
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    terminal.list_letters(*_days(first, last), topic=topic, limit=limit, depth=depth, as_json=as_json)


@letters_commands.command("show")
def letters_show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="Partition and offset, as in the list: 3/17.")],
    *,
    raw: Annotated[bool, typer.Option("--raw", help="Write the value alone, byte for byte.")] = False,
    depth: _Depth = 100_000,
    as_json: _Json = False,
) -> None:
    """Show one dead letter: origin, error, key, headers and value.

    Example: tripfold dead-letters show 3/17
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    terminal.show_letter(letter_id, raw=raw, depth=depth, as_json=as_json)


@letters_commands.command("retry")
def letters_retry(
    letter_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Letters, as in the list.")] = None,
    first: _First = None,
    last: _Last = None,
    topic: _OriginTopic = None,
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="All that --topic, --from and --to choose and that were not sent back yet.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Send back what was sent back before, too.")] = False,
    depth: _Depth = 100_000,
    as_json: _Json = False,
) -> None:
    """Send dead letters back to the topics that they came from, as they came: after an upgrade that can read them.

    What was sent back is marked in the topic, and not sent again without --again. A letter that still cannot be
    processed comes back as a dead letter of its own.

    Example: tripfold dead-letters retry 3/17 3/18
    """
    from tripfold.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    if everything == bool(letter_ids):
        raise typer.BadParameter("name letters, or choose them with --all", param_hint="ID")
    days = _days(first, last)
    terminal.retry_letters(letter_ids, *days, topic=topic, again=again, depth=depth, as_json=as_json)


def _days(first: dt.datetime | None, last: dt.datetime | None) -> tuple[dt.date | None, dt.date | None]:
    if first and last and first > last:
        raise typer.BadParameter(f"{first.date()} is after {last.date()}", param_hint="--from")
    return first.date() if first else None, last.date() if last else None
