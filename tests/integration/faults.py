"""Faults in the process of a service or a command that a test forks. The variable FAULT names the function to call."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.aggregate.replay.rebuild import Rebuild
from services.ingest.parsing.parser import FileTotals, total_trip_file
from services.ingest.worker import city_day
from tests import ROOT

FAULT = "TRIPFOLD_TEST_FAULT"
RELEASED = "TRIPFOLD_TEST_RELEASED"
"""The variable with the path of a file; while there is none, `hold_rebuild` holds."""


def apply() -> None:
    """Apply the fault that the environment names, if any."""
    if fault := os.environ.get(FAULT):
        globals()[fault]()


def crash_at_poison() -> None:
    """Kill a worker that parses a file with the word POISON in it, as the kernel does when memory runs out."""

    def poisoned(read: Callable[[], bytes], **options: Any) -> FileTotals:
        def read_or_crash() -> bytes:
            chunk = read()
            if b"POISON" in chunk:
                os.kill(os.getpid(), signal.SIGKILL)
            return chunk

        return total_trip_file(read_or_crash, **options)

    setattr(city_day, "total_trip_file", poisoned)  # noqa: B010  # mypy lets no other statement replace a function
    folder = str(Path(__file__).with_name("child_faults"))
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", str(ROOT))])


def hold_rebuild() -> None:
    """Make a rebuild wait before it compares the two generations, so that a test can end, stop or overtake it there."""
    compare, released = Rebuild._compare, Path(os.environ[RELEASED])

    async def wait_and_compare(self: Rebuild, *generations: int) -> Any:
        while not released.exists():  # noqa: ASYNC110, ASYNC240  # another process writes it
            await asyncio.sleep(0.01)
        return await compare(self, *generations)

    setattr(Rebuild, "_compare", wait_and_compare)  # noqa: B010  # as above
