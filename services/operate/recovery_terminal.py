"""What the commands for what failed do and print. Loaded by a command when it runs, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from services.api.requests import RequestDetail, RequestOverview
from services.operate import requests
from services.operate.command_line import command_settings, console, print_json, run_command
from shared import bitmap
from shared.events import ProcessRequested
from shared.identity import utc_now
from shared.publishing import KafkaPublisher
from shared.store import S3Store


def list_requests(*, limit: int, as_json: bool) -> None:
    """Show the latest requests."""
    settings = command_settings()

    async def read() -> list[RequestOverview]:
        async with S3Store(settings) as store:
            return await requests.latest_requests(store, limit=limit)

    found = run_command(read())
    if as_json:
        print_json(found)
        return
    table = Table("request", "date", "status", "cities", "failed", "requested")
    for one in found:
        cities = f"{one.counts.cities_done}/{one.counts.cities_total}"
        failed = str(one.counts.cities_failed or "")
        table.add_row(one.id, str(one.date), one.status.value, cities, failed, f"{one.requested_at:%Y-%m-%d %H:%M}")
    console.print(table)


def show_request(request_id: str, *, as_json: bool) -> None:
    """Show one request."""
    settings = command_settings()

    async def read() -> RequestDetail:
        async with S3Store(settings) as store:
            return await requests.request_detail(store, request_id)

    found = run_command(read())
    if as_json:
        print_json(found)
        return
    counts = found.counts
    console.print(
        f"{found.id}: {found.date}, {found.status.value}, {counts.cities_done} of {counts.cities_total} cities"
    )
    if found.failed_reason is not None:
        console.print(found.failed_reason, markup=False, highlight=False, soft_wrap=True)
    if found.failures:
        table = Table("city", "name", "reason", "in quarantine")
        for failure in found.failures:
            table.add_row(
                *map(escape, (failure.city_id, failure.city_name, failure.reason, failure.quarantine_key or ""))
            )
        console.print(table)
    if counts.cities_failed > len(found.failures):
        console.print(f"{counts.cities_failed} cities have failed; the first {len(found.failures)} are named")
    if counts.cities_failed or found.failed_reason is not None:
        console.print(f"'tripfold requests retry {found.id}' takes up what failed")
    for bad in found.bad_cities:
        console.print(f"left out of the list of cities: {bad.entry}: {bad.reason}", markup=False, soft_wrap=True)


def retry_requests(request_ids: Sequence[str], *, as_json: bool) -> None:
    """Take up the failed cities of requests again."""
    settings = command_settings()

    async def retry() -> list[ProcessRequested]:
        async with S3Store(settings) as store, KafkaPublisher(settings, source="retry") as publisher:
            return await requests.retry_requests(store, publisher, request_ids, clock=utc_now)

    retried = run_command(retry())
    if as_json:
        print_json([{"request_id": one.request_id, "date": one.date, "cities": _cities_of(one)} for one in retried])
        return
    for one in retried:
        cities = _cities_of(one)
        what = "its list of cities, and then all of them" if cities is None else f"{cities} failed cities"
        console.print(f"request {one.request_id} of {one.date}: asked for {what} again")


def _cities_of(requested: ProcessRequested) -> int | None:
    return bitmap.size(requested.retry.positions) if requested.retry else None
