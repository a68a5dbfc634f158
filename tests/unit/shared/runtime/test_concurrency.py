"""Prefetching one item ahead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from shared.runtime.concurrency import prefetch


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
