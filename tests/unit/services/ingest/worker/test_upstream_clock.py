"""The clock of an attempt: whose fault it is that a download takes long or breaks off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.ingest.upstream.errors import TransientUpstreamError
from services.ingest.worker import upstream_clock
from services.ingest.worker.upstream_clock import UpstreamClock
from shared.storage.object_store import StoreUnavailable


async def broken_download() -> AsyncIterator[bytes]:
    """Yield two chunks, and break off."""
    yield b"1"
    yield b"2"
    raise TransientUpstreamError("broke off")


async def read(clock: UpstreamClock, *, pause_s: float) -> list[bytes]:
    """Read a download, and pause after each chunk."""
    taken = []
    async for chunk in clock.chunks(broken_download()):
        taken.append(chunk)
        await asyncio.sleep(pause_s)
    return taken


async def test_a_download_that_breaks_off_while_it_is_read_is_the_upstreams_fault() -> None:
    """The error of the upstream costs it an attempt."""
    with pytest.raises(TransientUpstreamError, match="broke off"):
        await read(UpstreamClock(1), pause_s=0)


async def test_a_download_that_breaks_off_after_nobody_read_it_is_not_the_upstreams_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The upstream may close a connection that a slow S3 keeps waiting."""
    monkeypatch.setattr(upstream_clock, "HELD_MAX_S", 0.05)
    with pytest.raises(StoreUnavailable, match=r"S3 or this machine was slow.*broke off"):
        await read(UpstreamClock(1), pause_s=0.1)


async def test_only_waits_for_the_upstream_count_for_the_deadline() -> None:
    """Pauses between the waits do not count; the waits count together."""
    clock = UpstreamClock(0.1)

    async def wait(seconds: float) -> None:
        async with clock:
            await asyncio.sleep(seconds)

    for _ in range(3):
        await wait(0)
        await asyncio.sleep(0.1)
    await wait(0.06)
    with pytest.raises(TransientUpstreamError, match=r"TRIPFOLD_INGEST_DEADLINE_S allows, 0\.1 s"):
        await wait(0.06)


async def test_a_new_request_has_not_been_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait before the request excuses no fault of the upstream afterwards."""
    monkeypatch.setattr(upstream_clock, "HELD_MAX_S", 0.05)
    clock = UpstreamClock(1)
    await asyncio.sleep(0.1)
    clock.begin_request()
    with pytest.raises(TransientUpstreamError, match="broke off"):
        await read(clock, pause_s=0)
