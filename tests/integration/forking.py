"""Processes of the command ``tripfold``, forked from one that has loaded it: loading takes longer than most work.

The forked process is what ``python -m tripfold`` would be: it has arguments, an environment and files for its output of
its own, and runs ``tripfold.cli.main``. tests/integration/tripfold/local/test_up.py starts services as users do.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.integration import faults
from tripfold.local.supervisor import Supervisor, die_with

_OPERATE = ("verify", "repair", "rebuild", "restore")

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        *(f"tripfold.operate.{name}" for name in _OPERATE),
        *(f"services.{name}.app" for name in ("ingest", "aggregate", "api")),
        "tripfold.client.commands",
        "tests.integration.forking",
    ]
)


def fork(arguments: tuple[str, ...], environment: Mapping[str, str], out: Path, err: Path) -> BaseProcess:
    """Begin a command that appends what it prints to two files; it leads a session of its own."""
    process = _processes.Process(target=_run, args=(arguments, dict(environment), out, err))
    process.start()
    return process


def _run(arguments: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    from tripfold import cli  # noqa: PLC0415  # only the forked process needs it

    os.setsid()
    die_with(os.getppid())
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    faults.apply()
    sys.argv = ["tripfold", *arguments]
    cli.main()


class _Forked:
    """A forked process with what a supervisor uses of ``asyncio.subprocess.Process``."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    async def wait(self) -> None:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)


class ForkingSupervisor(Supervisor):
    """Forks its children; ``argv`` has the arguments of ``tripfold``."""

    async def _spawn(self, child: Any) -> Any:
        spec = child.spec
        child.process = _Forked(fork(spec.argv, spec.env, spec.log_path, spec.log_path))
        return child.process
