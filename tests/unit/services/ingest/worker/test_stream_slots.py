"""Stream slots: how many streams run at once."""

from __future__ import annotations

import asyncio

import pytest

from services.ingest.worker.stream_slots import NoFreeSlot, StreamSlots


class Streams:
    """Streams that each last until ``end``, and count how many run."""

    def __init__(self, count: int) -> None:
        self.slots = StreamSlots(count, background=1)
        self.end = asyncio.Event()
        self.running = 0
        self.running_max = 0
        self.running_in_background = 0

    async def one(self, *, background: bool = False) -> None:
        async with self.slots.hold(background=background):
            self.running += 1
            self.running_max = max(self.running_max, self.running)
            self.running_in_background += background
            await self.end.wait()
            self.running -= 1
            self.running_in_background -= background


async def test_no_more_streams_run_than_there_are_slots() -> None:
    """Ten streams of three slots run three at once."""
    streams = Streams(3)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        for _ in range(10):
            tasks.create_task(streams.one())
        while streams.running < 3:  # noqa: ASYNC110  # the test waits for this state
            await asyncio.sleep(0)
        streams.end.set()
    assert streams.running_max == 3


async def test_background_streams_leave_slots_free() -> None:
    """However many background streams wait, they hold one of three slots, and others get the rest at once."""
    streams = Streams(3)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        for background in (True,) * 5 + (False,) * 2:
            tasks.create_task(streams.one(background=background))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (streams.running, streams.running_in_background) == (3, 1)
        streams.end.set()


async def test_a_stream_that_finds_no_slot_in_time_gives_up() -> None:
    """The wait for a slot can be limited; a free slot is taken even without a wait."""
    slots = StreamSlots(1)
    async with slots.hold(wait_max_s=0):
        with pytest.raises(NoFreeSlot):
            async with slots.hold(wait_max_s=0):
                pass
    async with slots.hold(wait_max_s=0):
        pass
