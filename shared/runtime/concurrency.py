"""Bounded concurrency: a map with a limit, and a prefetch of one item. asyncio has neither."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


async def bounded_map(
    work: Callable[[_Item], Awaitable[_Result]], items: Sequence[_Item], *, limit: int
) -> list[_Result]:
    """Apply ``work`` to each item, at most ``limit`` at a time; return the results in the order of the items.

    The first error cancels the rest and is raised unchanged.
    """
    results: dict[int, _Result] = {}
    pending = iter(enumerate(items))

    async def work_off() -> None:
        for place, item in pending:
            results[place] = await work(item)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(limit, len(items))):
                tasks.create_task(work_off())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [results[place] for place in range(len(items))]


async def prefetch(source: AsyncIterator[_Item]) -> AsyncGenerator[_Item]:
    """Yield the items of ``source``, and fetch the next one while the caller works on the current one.

    No item may be None. Close the generator to cancel the pending fetch.
    """
    following = asyncio.ensure_future(anext(source, None))
    try:
        while (item := await following) is not None:
            following = asyncio.ensure_future(anext(source, None))
            yield item
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
