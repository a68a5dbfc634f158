"""Limits on the rate and the concurrency of requests to the upstream."""

from __future__ import annotations

import asyncio
import datetime as dt
from email.utils import format_datetime

import pytest

from services.ingest.upstream.circuit_breaker import RETRY_AFTER_MAX_S
from services.ingest.upstream.errors import TransientUpstreamError
from tests.integration.services.ingest.upstream.client import (
    BODY,
    GOOD,
    VirtualRetrier,
    client_of,
    until,
)
from tests.integration.services.ingest.upstream.hostile import (
    Connection,
    HostileServer,
    Request,
    whole,
)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_is_honoured_by_every_stream(status: int, form: str) -> None:
    """No stream sends a request before the time in Retry-After, given in seconds or as a date."""
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=120)
    busy = whole(b"", status, retry_after="100" if form == "seconds" else format_datetime(at, usegmt=True))
    retrier = VirtualRetrier()
    async with HostileServer(busy, GOOD) as server, client_of(server.url, retrier) as client:
        asked_at_s = retrier.time_s
        with pytest.raises(TransientUpstreamError):
            async with client.retry_policy._circuit.acquire(since_s=0, outage_limit_s=1):
                await client.attempt()
        await client.fetch("another")
        assert retrier.time_s - asked_at_s >= 100
        assert retrier.time_s - asked_at_s < 130


async def test_a_retry_after_beyond_reason_is_bounded() -> None:
    """A Retry-After of a year, or one that cannot be read, causes no long wait."""
    for written in ("31536000", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "soon", "-5", "Wed, 99 Foo 0000"):
        retrier = VirtualRetrier()
        async with (
            HostileServer(whole(b"", 503, retry_after=written), GOOD) as server,
            client_of(server.url, retrier) as client,
        ):
            await client.fetch_exactly(BODY)
            assert retrier.time_s - 1_000 < RETRY_AFTER_MAX_S + 10


async def test_the_request_rate_is_limited() -> None:
    """All streams together send no more requests in a second than the settings allow."""
    retrier = VirtualRetrier()
    async with HostileServer(GOOD) as server, client_of(server.url, retrier, requests_per_s=2) as client:
        await asyncio.gather(*(client.fetch(str(city)) for city in range(7)))
        assert retrier.time_s - 1_000 >= 3.0


async def test_concurrent_requests_are_limited() -> None:
    """Only a limited number of streams send requests at a time."""

    async def slow(request: Request, connection: Connection) -> None:
        await until(lambda: server.busy_max >= 3)
        await asyncio.sleep(0.02)  # a fourth request would come meanwhile
        await GOOD(request, connection)

    async with HostileServer(slow) as server, client_of(server.url, concurrency_max=3) as client:
        await asyncio.gather(*(client.fetch(str(city)) for city in range(12)))
        assert server.busy_max == 3
        assert len(server.requests) == 12
