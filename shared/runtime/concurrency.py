"""Bounded concurrency: a map with a limit, a prefetch of one item, and shared calls. asyncio has none of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

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


class SingleFlight(Generic[_Result]):
    """Runs one call for each name at a time, and shares its result among concurrent callers.

    A caller that arrives during a call shares the next one with the other callers that wait. So each caller gets the
    result of a call that began after it arrived.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[_Result]] = {}
        self._next: dict[Hashable, asyncio.Task[_Result]] = {}

    async def run(self, name: Hashable, work: Callable[[], Awaitable[_Result]]) -> _Result:
        """Return the result of ``work``, or of a call of this name that begins later. Errors are shared too."""
        task = self._next.get(name)
        if task is None:
            before = self._running.get(name)
            task = asyncio.create_task(self._after(before, name, work))
            (self._running if before is None else self._next)[name] = task
        # A caller that is cancelled must not cancel the shared call.
        return await asyncio.shield(task)

    async def _after(
        self, before: asyncio.Task[_Result] | None, name: Hashable, work: Callable[[], Awaitable[_Result]]
    ) -> _Result:
        if before is not None:
            await asyncio.wait([before])
            self._running[name] = self._next.pop(name)
        try:
            return await work()
        finally:
            # If a next call waits, it replaces this one in _running when this task ends.
            if name not in self._next:
                del self._running[name]
