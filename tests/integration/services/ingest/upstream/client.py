"""The client of the upstream as the ingest wires it, for tests against a hostile server.

The fault model: a server that sends any response, byte by byte, at any speed, and cuts it off anywhere.
Not in it: a server that gives a well-formed, complete and valid file of other trips.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
import pytest

from services.ingest.retries import next_attempt
from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.client import HttpUpstream
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from services.ingest.upstream.port import Validators
from services.ingest.upstream.retry import UpstreamRetryPolicy
from services.ingest.worker.streaming import FileRefused, StreamedFile, StreamProgress, stream_file
from shared.domain.events import ProcessRequested
from shared.domain.ids import mint_request_id
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from shared.runtime.settings import Settings
from tests.fakes.builders import Clock
from tests.fakes.metrics import REGISTRY
from tests.fakes.store import MemoryStore
from tests.integration.services.ingest.upstream.hostile import (
    Answer,
    whole,
)

DAY = dt.date(2024, 5, 1)


NOW = dt.datetime(2024, 5, 2, tzinfo=dt.UTC)

_Result = TypeVar("_Result")


def make_file(trips: int) -> bytes:
    """Write a trip file in which every record differs."""
    draw = random.Random(trips)
    return json.dumps(
        [
            {
                "departure-time": f"2024-05-01T{number % 24:02}:{draw.randrange(60):02}:00",
                "bus-type": f"BUS-{draw.randrange(10**6)}",
                "passengers": draw.randrange(90),
                "delay": f"PT{draw.randrange(5000)}S",
                "accident": False,
            }
            for number in range(trips)
        ]
    ).encode()


BODY = make_file(500)


LARGE = make_file(8_000)


GOOD = whole(BODY, etag='"v1"')


class VirtualRetrier(Retrier):
    """Sleeps for no time, and records how long it would have slept."""

    def __init__(self) -> None:
        super().__init__(health=Health(), wait_max_s=1)
        self.time_s = 1_000.0

    def now_s(self) -> float:
        return self.time_s

    async def sleep(self, seconds: float) -> None:
        self.time_s += seconds
        await asyncio.sleep(0)


class Client(msgspec.Struct):
    """The client under test, as the ingest wires it, and a bucket in memory."""

    upstream: HttpUpstream
    retry_policy: UpstreamRetryPolicy
    retrier: Retrier
    store: MemoryStore
    threads: ThreadPoolExecutor
    attempts: int = 0

    async def attempt(self, city: str = "1", known: Validators | None = None) -> StreamedFile | None:
        """Stream a city-day's file into the bucket once; None if it is unchanged."""
        self.attempts += 1
        async with self.upstream.download(city, DAY, known) as download:
            if download.chunks is None:
                return None
            upload = self.store.upload(f"raw/{city}")
            streamed = await stream_file(
                download.chunks, upload, date=DAY.isoformat(), progress=StreamProgress(), threads=self.threads
            )
            await upload.complete()
            return streamed

    async def drain(self, taken: list[int], *, pause_s: float = 0) -> None:
        """Read a city-day's file slowly, and record the length of each piece."""
        async with self.upstream.download("1", DAY, None) as download:
            assert download.chunks is not None
            async for chunk in download.chunks:
                taken.append(len(chunk))
                await asyncio.sleep(pause_s)

    async def fetch(self, city: str = "1") -> StreamedFile | None:
        """Stream a city-day's file into the bucket, and retry it as the ingest does."""
        return await retried(self.retry_policy, self.retrier, lambda: self.attempt(city))

    async def fetch_exactly(self, body: bytes) -> None:
        """Fetch, and check that every byte arrived once in the bucket, the hash and the parser."""
        streamed = await self.fetch()
        assert streamed is not None
        assert self.store.objects["raw/1"].body == body
        assert streamed.sha256 == hashlib.sha256(body).hexdigest()
        assert (streamed.size_bytes, streamed.totals.contribution.trips) == (len(body), len(json.loads(body)))

    async def failure(self) -> str:
        """Fetch a file that must fail, and return the reason; nothing may be stored."""
        with pytest.raises((PermanentUpstreamError, FileRefused)) as caught:
            await self.fetch()
        assert not self.store.objects
        return str(caught.value)


async def retried(
    retry_policy: UpstreamRetryPolicy, retrier: Retrier, attempt: Callable[[], Awaitable[_Result]]
) -> _Result:
    """Run ``attempt`` until it succeeds or is given up, as a worker does, but without the topic of retries."""

    def now() -> dt.datetime:
        return NOW + dt.timedelta(seconds=retrier.now_s())

    task = ProcessRequested(request_id=mint_request_id(NOW), date=DAY, requested_at=NOW)
    while True:
        began_at = now()
        down_s = (began_at - (task.down_since or began_at)).total_seconds()
        try:
            return await retry_policy.run_once(attempt, down_s=down_s)
        except (TransientUpstreamError, UpstreamDown) as fault:
            task = next_attempt(
                task,
                fault,
                began_at=began_at,
                now=now(),
                attempts_max=retry_policy.attempts_max,
                outage_limit_s=retry_policy.outage_limit_s,
            )
        assert task.not_before is not None
        await retrier.sleep((task.not_before - now()).total_seconds())


@contextlib.asynccontextmanager
async def client_of(url: str, retrier: Retrier | None = None, **changes: object) -> AsyncIterator[Client]:
    """Open a client of the upstream at ``url``; ``changes`` are settings without ``upstream_``."""
    given = {"attempts": 3, "read_timeout_s": 5, "requests_per_s": 10_000, "outage_limit_s": 20, **changes}
    settings = Settings.model_validate({"upstream_url": url, **{f"upstream_{name}": given[name] for name in given}})
    retrier = retrier or Retrier(health=Health(), wait_max_s=1)
    circuit = CircuitBreaker(retrier)
    retry_policy = UpstreamRetryPolicy(
        circuit,
        attempts_max=settings.upstream_attempts,
        outage_limit_s=settings.upstream_outage_limit_s,
        concurrency_max=settings.upstream_concurrency_max,
    )
    with ThreadPoolExecutor(8) as threads:
        async with HttpUpstream(settings, circuit) as http:
            yield Client(http, retry_policy, retrier, MemoryStore(Clock(NOW)), threads)


def counted(outcome: str) -> float:
    """Return how many requests ended with this outcome."""
    value = REGISTRY.get_sample_value("tripfold_upstream_requests_total", {"outcome": outcome})
    return value or 0.0


def resumptions() -> float:
    """Return how many downloads resumed after a break."""
    return REGISTRY.get_sample_value("tripfold_upstream_resumptions_total") or 0.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds, or fail."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # the condition has no event
            await asyncio.sleep(0.001)


BOMB = b"[" + b" " * 100_000_000


def redirect(location: str, status: int = 302) -> Answer:
    """Respond with a redirect."""
    return whole(b"", status, location=location)


async def fail_in_turn(circuit: CircuitBreaker, error: Exception, *before: Exception) -> None:
    """End a request with ``error``, after other requests ended with those ``before`` while it ran."""
    async with circuit.acquire(since_s=0, outage_limit_s=60):
        for other in before:
            with contextlib.suppress(type(other)):
                await fail_in_turn(circuit, other)
        raise error
