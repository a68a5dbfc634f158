"""Doing once, for all who ask at about the same time, what takes long and says the same to each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class SingleFlight(Generic[_Result]):
    """Runs one piece of work of a name at a time.

    Who asks while it is under way waits for the next one, together with all the others who do: so everybody gets a
    result of work that was begun after they asked, and nothing older.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[_Result]] = {}
        self._next: dict[str, asyncio.Task[_Result]] = {}

    async def run(self, name: str, work: Callable[[], Awaitable[_Result]]) -> _Result:
        """Return the result of ``work``, or of what another one of this name calls at least as late. Errors too."""
        task = self._next.get(name)
        if task is None:
            before = self._running.get(name)
            task = asyncio.create_task(self._after(before, name, work))
            (self._running if before is None else self._next)[name] = task
        # One who gives up does not take the result from the others.
        return await asyncio.shield(task)

    async def _after(
        self, before: asyncio.Task[_Result] | None, name: str, work: Callable[[], Awaitable[_Result]]
    ) -> _Result:
        if before is not None:
            await asyncio.wait([before])
            self._running[name] = self._next.pop(name)
        try:
            return await work()
        finally:
            # Whoever waits to be the next one is woken by the end of this task, and takes its place.
            if name not in self._next:
                del self._running[name]
