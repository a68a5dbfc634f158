"""Runs a task in a process of its own, because its file may have crashed another process.

The parent sees for certain that its child has crashed. Nothing else counts as a crash: no note in the bucket, and no
outage of S3 or Kafka, however long. After CRASHES_MAX crashes in a row the child no longer parses the file: it stores
the file in quarantine. A worker runs one such child at a time; its other tasks continue.

A child that ends by an exception has not crashed: this task fails in a way that its file or the code explains.

The child, ``python -m services.ingest.isolated``, reads the task from its standard input and writes a line when it
begins. It ends with the task, or with its parent, whose end closes the standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from shared.domain.events import IngestCity
from shared.kafka.failed_keys import RecordFault

CRASHES_MAX = 3
EXCEPTION = 1
"""Python's exit code after an exception."""
CHILD = ("-m", "services.ingest.isolated")

_log = structlog.get_logger()


class IsolatedTask(msgspec.Struct, frozen=True):
    """A task for a process of its own, and how many such processes have crashed over it."""

    task: IngestCity
    crashes: int


class IsolationFailed(RuntimeError):
    """The child could not begin, or it crashed without parsing the file."""


class Isolation:
    """Runs tasks in processes of their own, one at a time."""

    def __init__(self, run_child: Callable[[IsolatedTask], Awaitable[bool]]) -> None:
        self._run_child = run_child
        self._one_at_a_time = asyncio.Lock()

    async def run(self, task: IngestCity) -> None:
        """Run a task until a process ends it without a crash."""
        async with self._one_at_a_time:
            for crashes in range(CRASHES_MAX + 1):
                if await self._run_child(IsolatedTask(task, crashes)):
                    return
                _log.error("isolated_process_crashed", crashes=crashes + 1)
        raise IsolationFailed(f"{CRASHES_MAX + 1} processes crashed over the file of {task.date}/{task.city_id}")


async def run_child(isolated: IsolatedTask) -> bool:
    """Run a task in a child process; return False if the child crashed.

    Raises IsolationFailed if the child cannot begin, and RecordFault if it ends by an exception.
    """
    child = await asyncio.create_subprocess_exec(sys.executable, *CHILD, stdin=PIPE, stdout=PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            child.stdin.write(msgspec.json.encode(isolated) + b"\n")
            await child.stdin.drain()
        begun = await child.stdout.readline()
        code = await child.wait()
    finally:
        if child.returncode is None:  # the worker stops
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if code and not begun:
        raise IsolationFailed(f"the process of an isolated task did not begin: exit code {code}")
    if code == EXCEPTION:
        raise RecordFault("the process of an isolated task ended by the exception that its log has")
    return code == 0
