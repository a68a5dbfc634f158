"""Concurrent calls: an error of one is raised after all the others have ended."""

from __future__ import annotations

import asyncio

import pytest

from shared.runtime.retry import DependencyUnavailable, run_all


async def test_an_error_is_raised_after_all_calls_ended() -> None:
    """The other calls finish first: otherwise a retry would run beside them."""
    ended: list[str] = []

    async def fail() -> None:
        raise DependencyUnavailable("away")

    async def go_on() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        ended.append("the other one")

    with pytest.raises(DependencyUnavailable, match="away"):
        await run_all([fail(), go_on()])
    assert ended == ["the other one"]
