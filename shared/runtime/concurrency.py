"""Doing many things side by side, but not all at once, and one thing ahead of another, but not far ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


async def bounded_map(
    work: Callable[[_Item], Awaitable[_Result]], items: Sequence[_Item], *, limit: int
) -> list[_Result]:
    """Apply ``work`` to each item, at most ``limit`` at a time; return the results in the items' order.

    The first error ends the rest, and is raised as it is.
    """
    results: dict[int, _Result] = {}
    waiting = iter(enumerate(items))

    async def take_from_waiting() -> None:
        for place, item in waiting:
            results[place] = await work(item)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(limit, len(items))):
                tasks.create_task(take_from_waiting())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [results[place] for place in range(len(items))]


async def prefetch(source: AsyncIterator[_Item]) -> AsyncGenerator[_Item]:
    """Yield what ``source`` yields, and let it find the next item while the one before is being worked on.

    No item is None. Close it, or what it is looking for goes on.
    """
    following = asyncio.ensure_future(anext(source, None))
    try:
        while (item := await following) is not None:
            following = asyncio.ensure_future(anext(source, None))
            yield item
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
