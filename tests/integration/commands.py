"""The tripfold command as an operator runs it: each time a process of its own, which can be stopped and killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from shared.runtime.settings import Settings
from tests.integration.forking import fork
from tests.integration.running import environment_of

DEADLINE_S = 90
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


class CommandResult(msgspec.Struct, frozen=True):
    """How a command ended: its exit code (negative: the signal that killed it), and what it printed."""

    code: int
    out: str
    err: str


class Command:
    """A command that was begun."""

    def __init__(self, process: BaseProcess, folder: Path) -> None:
        self._process = process
        self._folder = folder

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    @property
    def printed(self) -> str:
        """The standard output so far."""
        return (self._folder / "out").read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        pid = self._process.pid
        if pid is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def ended(self) -> CommandResult:
        """Wait until it has ended."""
        await asyncio.to_thread(self._process.join, DEADLINE_S)
        assert self._process.exitcode is not None, "the command did not end"
        return CommandResult(self._process.exitcode, self.printed, (self._folder / "err").read_text())


@contextlib.contextmanager
def started(settings: Settings, *arguments: str, variables: Mapping[str, str] = NO_VARIABLES) -> Iterator[Command]:
    """Begin a command, with ``variables`` of its own; it is killed if it still runs at the end."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("out", "err"):
            Path(folder, name).touch()
        environment = {**environment_of(settings), **variables}
        process = fork(arguments, environment, Path(folder, "out"), Path(folder, "err"))
        command = Command(process, Path(folder))
        try:
            yield command
        finally:
            command.signal(signal.SIGKILL)
            process.join(DEADLINE_S)


async def tripfold(settings: Settings, *arguments: str) -> tuple[int, str, str]:
    """Run a command to its end; return its exit code and what it printed."""
    with started(settings, *arguments) as command:
        ended = await command.ended()
    return ended.code, ended.out, ended.err


async def run_json(settings: Settings, *arguments: str) -> tuple[int, Any]:
    """Run a command with --json; return its exit code and what it told."""
    code, out, err = await tripfold(settings, *arguments, "--json")
    assert out, err
    return code, msgspec.json.decode(out)
