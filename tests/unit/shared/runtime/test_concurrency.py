"""Prefetching one item ahead, and calls that concurrent callers share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from shared.runtime.concurrency import SingleFlight, prefetch


class Broken(Exception):
    """An error in a source."""


async def numbers(taken: list[int], *, broken_at: int | None = None) -> AsyncIterator[int]:
    """Yield 0 to 4, and note which were taken."""
    for number in range(5):
        if number == broken_at:
            raise Broken
        taken.append(number)
        yield number


async def test_the_next_item_is_fetched_while_one_is_handled() -> None:
    """All items come in order, and the source is at most one ahead."""
    taken: list[int] = []
    worked_on = []
    async for number in prefetch(numbers(taken)):
        for _ in range(5):
            await asyncio.sleep(0)
        assert taken == list(range(min(number + 2, 5)))
        worked_on.append(number)
    assert worked_on == [0, 1, 2, 3, 4]


async def test_an_error_of_the_source_is_raised_in_its_place() -> None:
    """The items before an error are handled; then the error itself is raised."""
    items = prefetch(numbers([], broken_at=2))
    assert [await anext(items), await anext(items)] == [0, 1]
    with pytest.raises(Broken):
        await anext(items)


async def test_the_source_is_cancelled_with_its_caller() -> None:
    """A pending read of the source is cancelled together with its caller."""
    ended = asyncio.Event()

    async def endless() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with contextlib.aclosing(prefetch(endless())) as items:
        async for _ in items:
            await asyncio.sleep(0)
            break
    assert ended.is_set()


class Counting:
    """Work that waits for its gate and returns how often it was started."""

    def __init__(self) -> None:
        self.started = 0
        self.gate = asyncio.Event()

    async def __call__(self) -> int:
        self.started += 1
        mine = self.started
        await self.gate.wait()
        return mine


async def settled() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_callers_during_a_call_share_the_next_one() -> None:
    """Callers that arrive during a call share the next one; none gets a result that was started before it asked."""
    shared, work = SingleFlight[int](), Counting()
    first = asyncio.create_task(shared.run("a", work))
    await settled()
    later = [asyncio.create_task(shared.run("a", work)) for _ in range(5)]
    await settled()
    assert work.started == 1
    work.gate.set()
    assert await first == 1
    assert await asyncio.gather(*later) == [2] * 5
    assert await shared.run("a", work) == 3


async def test_calls_under_different_names_run_concurrently() -> None:
    """A call under another name starts at once."""
    shared, work = SingleFlight[int](), Counting()
    asking = [asyncio.create_task(shared.run(name, work)) for name in "ab"]
    await settled()
    assert work.started == 2
    work.gate.set()
    assert await asyncio.gather(*asking) == [1, 2]


async def test_a_cancelled_caller_does_not_cancel_the_call_of_the_others() -> None:
    """The remaining caller gets the result."""
    shared, work = SingleFlight[int](), Counting()
    first = asyncio.create_task(shared.run("a", work))
    second = asyncio.create_task(shared.run("a", work))
    third = asyncio.create_task(shared.run("a", work))
    await settled()
    first.cancel()
    second.cancel()
    work.gate.set()
    assert await third == 2
    assert await shared.run("a", work) == 3


async def test_a_failed_call_is_not_kept() -> None:
    """Each caller gets the error, and the next call starts anew."""
    shared, work = SingleFlight[int](), Counting()
    work.gate.set()

    async def broken() -> int:
        raise ConnectionResetError

    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            await shared.run("a", broken)
    assert await shared.run("a", work) == 1
