"""Holds the rebuild of a forked command at one point, so that a test can end, stop or overtake it there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from services.aggregate.replay.rebuild import Rebuild


def held(folder: Path) -> Callable[[], None]:
    """Return what makes the rebuild of a process wait for `release`, before it compares the two generations."""
    return partial(_hold, folder / "released")


def release(folder: Path) -> None:
    """Let the rebuilds that wait in a folder go on."""
    (folder / "released").touch()


def _hold(released: Path) -> None:
    compare = Rebuild._compare

    async def wait_and_compare(self: Rebuild, *generations: int) -> Any:
        while not released.exists():  # noqa: ASYNC110, ASYNC240  # another process writes it
            await asyncio.sleep(0.01)
        return await compare(self, *generations)

    setattr(Rebuild, "_compare", wait_and_compare)  # noqa: B010  # mypy lets no other statement replace a method
