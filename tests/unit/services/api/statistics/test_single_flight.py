"""Work that is done once for all who ask together."""

from __future__ import annotations

import asyncio

import pytest

from services.api.statistics.cache import SingleFlight


class Counting:
    """Work that returns how often it was begun, once it is let go on."""

    def __init__(self) -> None:
        self.begun = 0
        self.gate = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        mine = self.begun
        await self.gate.wait()
        return mine


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_work_begins_after_whoever_asks() -> None:
    """Those who ask while work is under way share the next one; none gets what was begun before they asked."""
    shared, work = SingleFlight[int](), Counting()
    first = asyncio.create_task(shared.run("a", work))
    await settled()
    later = [asyncio.create_task(shared.run("a", work)) for _ in range(5)]
    await settled()
    assert work.begun == 1
    work.gate.set()
    assert await first == 1
    assert await asyncio.gather(*later) == [2] * 5
    assert await shared.run("a", work) == 3


async def test_names_do_not_wait_for_each_other() -> None:
    """Work of another name is begun at once."""
    shared, work = SingleFlight[int](), Counting()
    asking = [asyncio.create_task(shared.run(name, work)) for name in "ab"]
    await settled()
    assert work.begun == 2
    work.gate.set()
    assert await asyncio.gather(*asking) == [1, 2]


async def test_one_who_gives_up() -> None:
    """One who gives up leaves the work to the others; an error is everybody's, and the next work is begun anew."""
    shared, work = SingleFlight[int](), Counting()
    first = asyncio.create_task(shared.run("a", work))
    second = asyncio.create_task(shared.run("a", work))
    third = asyncio.create_task(shared.run("a", work))
    await settled()
    first.cancel()
    second.cancel()
    work.gate.set()
    assert await third == 2

    async def broken() -> int:
        raise ConnectionResetError

    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            await shared.run("a", broken)
    assert await shared.run("a", work) == 3
