"""The commands for what failed (requests, files in quarantine, dead letters): see it, and take it up again."""

from __future__ import annotations

from typing import Annotated

import typer

requests_commands = typer.Typer(help="Requests: how far they have come, and their failed cities.", no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]
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
    from services.operate import recovery_terminal as terminal  # noqa: PLC0415  # loaded when it runs: quick --help

    terminal.list_requests(limit=limit, as_json=as_json)


@requests_commands.command("show")
def requests_show(request_id: _RequestId, *, as_json: _Json = False) -> None:
    """Show one request, and every failure with its reason.

    Example: tripfold requests show 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    from services.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

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
    from services.operate import recovery_terminal as terminal  # noqa: PLC0415  # as above

    terminal.retry_requests(request_ids, as_json=as_json)
