"""Lists and shows the requests of the bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from services.api.requests.service import (
    Latest,
    RequestDetail,
    RequestOverview,
    detail_of,
    latest_requests,
    overview_of,
)
from shared.domain.errors import OperatorError
from shared.domain.ids import RequestId, parse_request_id
from shared.domain.objects import RequestAction, RequestRecord
from shared.storage.object_store import ObjectStore
from shared.storage.repository import read_request_record
from tripfold.console import Records, print_remark, printable
from tripfold.operate.command_line import (
    AsJson,
    command_settings,
    console,
    open_bucket,
    print_json,
    print_line,
    run_command,
)

WIDE_COLUMNS = 100

requests_commands = typer.Typer(
    help="Requests: their progress, and their failed cities.", no_args_is_help=True, add_completion=False
)


class AuditedOverview(RequestOverview, frozen=True, kw_only=True):
    """A request, its progress, and who acted on it. The API does not show addresses of clients."""

    actions: tuple[RequestAction, ...]


class AuditedDetail(RequestDetail, frozen=True, kw_only=True):
    """A request, its progress and failures, and who acted on it."""

    actions: tuple[RequestAction, ...]


class UnknownRequest(OperatorError):
    """There is no request with this id."""


@requests_commands.command("list")
def list_command(
    *,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1_000, help="The most requests to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the latest requests, the latest first.

    Example: tripfold requests list --limit 50
    """
    settings = command_settings()

    async def read() -> Latest:
        async with open_bucket(settings) as store:
            return await latest_requests(store, limit)

    found = run_command(read())
    overviews = [audited_overview(record) for record in found.records]
    if as_json:
        print_json(overviews)
        return
    records_of(overviews, width=console.width).print(console)
    for one in found.unreadable:
        print_remark(f"{one.key} is not listed: {one.reason}")


def audited_overview(record: RequestRecord) -> AuditedOverview:
    """Return the fields of a request that the list shows."""
    return AuditedOverview(**msgspec.structs.asdict(overview_of(record)), actions=record.actions)


def records_of(requests: Sequence[AuditedOverview], *, width: int) -> Records:
    """Return the records of requests for a terminal of ``width`` columns. A narrow one lacks the last two fields."""
    headings = ("request", "date", "status", "cities", "requested (UTC)", "by")
    shown = len(headings) if width >= WIDE_COLUMNS else 4
    records = Records(*headings[:shown], whole={"request", "date", "requested (UTC)"})
    for one in requests:
        counts = one.counts
        failed = f", {counts.cities_failed} failed" if counts.cities_failed else ""
        fields = (
            one.id,
            str(one.date),
            one.status.value,
            f"{counts.cities_done}/{counts.cities_total}{failed}",
            f"{one.requested_at:%Y-%m-%d %H:%M}",
            ", ".join(dict.fromkeys(map(actor_of, one.actions))),
        )
        records.add(*fields[:shown])
    return records


def actor_of(action: RequestAction) -> str:
    """Return who acted: the name of the API key, or without one the address of the client."""
    return action.key or action.client


@requests_commands.command("show")
def show_command(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="The request's id.")], *, as_json: AsJson = False
) -> None:
    """Show one request, and every failure with its reason.

    Example: tripfold requests show 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    settings = command_settings()

    async def read() -> AuditedDetail:
        async with open_bucket(settings) as store:
            return await request_detail(store, request_id)

    found = run_command(read())
    if as_json:
        print_json(found)
        return
    counts = found.counts
    console.print(
        f"{found.id}: {found.date}, {found.status.value}, {counts.cities_done} of {counts.cities_total} cities"
    )
    console.print(
        f"requested {found.requested_at:%Y-%m-%d %H:%M:%S}, last progress {found.updated_at:%Y-%m-%d %H:%M:%S} UTC"
    )
    for action in found.actions:
        by = f"key {action.key}, {action.client}" if action.key else action.client
        words = f"{action.at:%Y-%m-%d %H:%M:%S} {action.action} {action.parameters} by {by}: {action.result}"
        print_line(printable(" ".join(words.split())))
    if found.failed_reason is not None:
        print_line(printable(found.failed_reason))
    if found.failures:
        records = Records("city", "name", "reason", "in quarantine", whole={"city"})
        for failure in found.failures:
            records.add(failure.city_id, failure.city_name, failure.reason, failure.quarantine_key or "")
        records.print(console)
    if counts.cities_failed > len(found.failures):
        console.print(f"{counts.cities_failed:,} cities failed; the first {len(found.failures):,} are named.")
    if counts.cities_failed or found.failed_reason is not None:
        print_line(f"Retry what failed: 'tripfold retry {found.id}'.")
    for bad in found.bad_cities:
        print_line(f"Skipped in the list of cities: {printable(f'{bad.entry}: {bad.reason}')}")


async def request_detail(store: ObjectStore, request_id: str) -> AuditedDetail:
    """Return a request with its failures. Raises UnknownRequest if there is none."""
    record = await read_request(store, request_id)
    return AuditedDetail(**msgspec.structs.asdict(detail_of(record)), actions=record.actions)


async def read_request(store: ObjectStore, text: str) -> RequestRecord:
    """Read the record of the request whose id ``text`` spells. Raises UnknownRequest if there is none."""
    request_id: RequestId | None = parse_request_id(text)
    if request_id is not None:
        record = await read_request_record(store, request_id)
        if record is not None:
            return record
    raise UnknownRequest(f"there is no request {text[:100]!r}. List the latest: 'tripfold requests list'.")
