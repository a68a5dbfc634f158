"""Doing many things side by side, but not all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


async def map_bounded(
    work: Callable[[_Item], Awaitable[_Result]], items: Sequence[_Item], *, at_once_max: int
) -> list[_Result]:
    """Apply ``work`` to each item, at most ``at_once_max`` at a time; return the results in the items' order.

    The first error ends the rest, and is raised as it is.
    """
    results: dict[int, _Result] = {}
    waiting = iter(enumerate(items))

    async def take_from_waiting() -> None:
        for place, item in waiting:
            results[place] = await work(item)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(at_once_max, len(items))):
                tasks.create_task(take_from_waiting())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [results[place] for place in range(len(items))]
