"""Kills each process that parses a file with the word POISON in it.

Python imports this module at startup if its folder is in PYTHONPATH. SIGKILL ends the worker or its subprocess parser,
as a crash in a library or the kernel's out-of-memory killer would.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from services.ingest.parsing import parser

_total_trip_file = parser.total_trip_file


def _poisoned(read: Callable[[], bytes], **options: Any) -> parser.FileTotals:
    def read_or_crash() -> bytes:
        chunk = read()
        if b"POISON" in chunk:
            os.kill(os.getpid(), signal.SIGKILL)
        return chunk

    return _total_trip_file(read_or_crash, **options)


parser.total_trip_file = _poisoned
if worker := sys.modules.get("services.ingest.worker.city_day"):  # a process that was forked has loaded it before
    worker.total_trip_file = _poisoned  # type: ignore[attr-defined]  # mypy sees no attributes of a module in sys.modules
