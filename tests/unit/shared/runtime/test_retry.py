"""Retries show their reason. After concurrent calls, an error of one is raised once all the others have ended."""

from __future__ import annotations

import asyncio

import pytest

from shared.runtime.health import Health
from shared.runtime.retry import DependencyUnavailable, Retrier, run_all


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


@pytest.mark.parametrize(
    ("error", "reason"), [(DependencyUnavailable("S3 is away"), "S3 is away"), (KeyError("city"), "KeyError: 'city'")]
)
async def test_only_an_unexpected_error_shows_its_class(error: Exception, reason: str) -> None:
    """The message of an expected error is written for operators, so it stands alone in the health."""
    retrier = Retrier(health=Health(), wait_max_s=0)
    errors = [error]

    async def attempt() -> dict[str, str]:
        if errors:
            raise errors.pop()
        return retrier.health.faults

    assert await retrier.retry_until_available("batch", attempt) == {"batch": reason}
