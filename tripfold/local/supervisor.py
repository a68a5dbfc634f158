"""Runs child processes: starts them in order, restarts them, stops them, and leaves none behind.

Each child leads a session of its own, so Ctrl-C in a terminal reaches the supervisor alone. What can go wrong:

- A child ends before it is ready, or is not ready in time: ``start`` raises ChildFailed with its last log lines.
- A child ends later: with ``restart=True`` it is started again; without, or after RESTARTS_MAX restarts within
  RESTART_WINDOW_S, ``wait`` raises ChildFailed.
- A child does not stop within its share of STOP_DEADLINE_S: its whole process group is killed.
- The supervisor is killed with SIGKILL: on Linux the kernel then kills each child (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import enum
import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import msgspec

from shared.domain.errors import OperatorError

STOP_DEADLINE_S = 9.0
KILL_DEADLINE_S = 0.9
PROBE_TIMEOUT_S = 2.0
PROBE_INTERVAL_S = 0.05
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
RESTART_WAIT_MIN_S = 0.1
LOG_BYTES_MAX = 16 * 1024**2
LOG_CHECK_INTERVAL_S = 5.0
LOG_TAIL_BYTES = 8 * 1024
LOG_TAIL_LINES = 8

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

_Result = TypeVar("_Result")

Probe = Callable[[], Awaitable[bool]]
"""Tells whether a child is ready. False, OSError and TimeoutError all mean not yet."""


class ChildProcess(msgspec.Struct, frozen=True, kw_only=True):
    """How to run one child.

    Its output is appended to ``log_path``. Without a ``ready`` probe it is ready once it runs. ``leftovers`` are files
    that a killed child leaves behind; the supervisor removes them.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    log_path: Path
    cwd: Path | None = None
    ready: Probe | None = None
    ready_deadline_s: float = 30.0
    restart: bool = False
    leftovers: tuple[Path, ...] = ()


class EventKind(enum.StrEnum):
    """What happened to a child."""

    READY = "ready"
    ENDED = "ended"
    RESTARTING = "restarting"
    KILLED = "killed"


class ChildEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a child; ``text`` says it in a line for people."""

    kind: EventKind
    name: str
    text: str


class StopRequested(Exception):
    """The supervisor was asked to stop while it started a child or did other work."""


class ChildFailed(OperatorError):
    """A child did not become ready, or ended for good without being asked to."""

    def __init__(self, name: str, reason: str, log_path: Path, log_lines: Sequence[str] = ()) -> None:
        text = f"{name} {reason} (its log is {log_path})"
        if log_lines:
            text = "\n".join([f"{name} {reason}; the end of {log_path}:", *(f"    {line}" for line in log_lines)])
        super().__init__(text)
        self.name = name
        self.log_lines = tuple(log_lines)


def http_probe(
    url: str,
    *,
    method: str = "GET",
    headers: Callable[[], Mapping[str, str]] = dict,
    statuses: Collection[int] = (200,),
) -> Probe:
    """Make a probe that is true once ``url`` (plain HTTP) returns one of the statuses.

    ``headers`` is called for each request, because a signature contains the time.
    """
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def ask() -> bool:
        connection = http.client.HTTPConnection(parts.netloc, timeout=PROBE_TIMEOUT_S)
        try:
            connection.request(method, target, headers=dict(headers()))
            return connection.getresponse().status in statuses
        except http.client.HTTPException:
            return False
        finally:
            connection.close()

    return lambda: asyncio.to_thread(ask)


class Supervisor:
    """Children as an async context: they run inside ``async with``, and none is left after it.

    ``on_event`` is called in the event loop. With ``handle_signals`` (main thread only) SIGINT and SIGTERM request a
    stop. Children inherit ``held_fds``: a lock on their data is held until the last of them is gone.
    """

    def __init__(
        self,
        *,
        on_event: Callable[[ChildEvent], None] | None = None,
        handle_signals: bool = False,
        held_fds: Sequence[int] = (),
    ) -> None:
        self._on_event = on_event
        self._signals = (signal.SIGINT, signal.SIGTERM) if handle_signals else ()
        self._held_fds = tuple(held_fds)
        self._groups: list[list[_Child]] = []
        self._stopping = asyncio.Event()
        self.failure: BaseException | None = None
        """Why a child is gone for good, if one is."""

    async def __aenter__(self) -> Self:
        for number in self._signals:
            asyncio.get_running_loop().add_signal_handler(number, self.request_stop)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stop()
        finally:
            for number in self._signals:
                asyncio.get_running_loop().remove_signal_handler(number)

    async def start(self, *children: ChildProcess) -> None:
        """Start ``children`` side by side, as one group that also stops together, and wait until all are ready.

        Raises ChildFailed if one does not become ready, or one started earlier is gone for good, and StopRequested.
        """
        group = [_Child(spec) for spec in children]
        self._groups.append(group)
        for child in group:
            child.task = asyncio.create_task(self._supervise(child), name=child.spec.name)
            child.task.add_done_callback(self._on_task_done)
        for child in group:
            # A failure and a stop set this, too.
            await child.ready.wait()
        self._raise_if_stopping()

    async def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Do ``work``, or cancel it and raise as ``start`` does if a child is gone for good or a stop is requested."""
        tasks = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                self._raise_if_stopping()
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _raise_if_stopping(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._stopping.is_set():
            raise StopRequested

    async def wait(self) -> None:
        """Wait until a stop is requested. Raises ChildFailed if a child is gone for good before that."""
        await self._stopping.wait()
        if self.failure is not None:
            raise self.failure

    def request_stop(self) -> None:
        """Let ``start`` and ``wait`` return; children run until the context is left, but none is started again."""
        self._stopping.set()
        for child in self._children():
            child.ready.set()

    async def stop(self) -> None:
        """Stop all children, the last group first: SIGTERM, then SIGKILL when the group's time is over."""
        self.request_stop()
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        try:
            for groups_left in range(len(self._groups), 0, -1):
                # Time that one group does not use goes to the groups after it.
                grace_s = max(0.0, deadline_s - time.monotonic()) / groups_left
                await self._stop_group(self._groups[groups_left - 1], grace_s)
        finally:
            for child in self._children():
                child.send(signal.SIGKILL)

    def pid(self, name: str) -> int:
        """Return the process id of a running child. Raises LookupError if it does not run now."""
        for child in self._children():
            if child.spec.name == name and (process := child.running()):
                return process.pid
        raise LookupError(f"no child named {name!r} is running")

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process group of a running child, as a fault from outside would."""
        os.killpg(self.pid(name), number)

    def _children(self) -> Iterator[_Child]:
        for group in self._groups:
            yield from group

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure = self.failure or error
            self.request_stop()

    async def _supervise(self, child: _Child) -> None:
        """Run one child, and run it again, until it has ended for good; then raise the reason."""
        spec = child.spec
        restarts: deque[float] = deque(maxlen=RESTARTS_MAX)
        was_ready = False
        while True:
            process = await self._spawn(child)
            reason = await _become_ready(child, process)
            if reason is None:
                was_ready = True
                self._tell(child, EventKind.READY, f"ready in {time.monotonic() - child.started_at_s:.1f} s")
                child.ready.set()
                reason = await _run_to_the_end(child, process)
            _signal_group(process.pid, signal.SIGKILL)  # what it started
            for path in spec.leftovers:
                path.unlink(missing_ok=True)
            if self._stopping.is_set():
                return
            self._tell(child, EventKind.ENDED, reason)
            now_s = time.monotonic()
            too_often = len(restarts) == RESTARTS_MAX and restarts[0] > now_s - RESTART_WINDOW_S
            if too_often:
                reason += f", after {RESTARTS_MAX} restarts within {RESTART_WINDOW_S:.0f} s"
            if too_often or not was_ready or not spec.restart:
                raise ChildFailed(spec.name, reason, spec.log_path, child.log_tail())
            recent = sum(at_s > now_s - RESTART_WINDOW_S for at_s in restarts)
            wait_s = RESTART_WAIT_MIN_S * 2**recent
            self._tell(child, EventKind.RESTARTING, f"is started again in {wait_s:.1f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), timeout=wait_s)
                return
            restarts.append(time.monotonic())

    async def _spawn(self, child: _Child) -> asyncio.subprocess.Process:
        spec = child.spec
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        parent_pid = os.getpid()
        with spec.log_path.open("ab") as log:
            child.log_offset = log.tell()
            child.started_at_s = time.monotonic()
            try:
                child.process = await asyncio.create_subprocess_exec(
                    *spec.argv,
                    cwd=spec.cwd,
                    env=spec.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=self._held_fds,
                    preexec_fn=lambda: _die_with(parent_pid),
                )
            except OSError as error:
                raise ChildFailed(spec.name, f"could not be run: {error}", spec.log_path) from error
        if self._stopping.is_set():
            # The stop was requested while the process was being made, and did not reach it.
            child.send(signal.SIGTERM)
        return child.process

    async def _stop_group(self, group: Sequence[_Child], grace_s: float) -> None:
        children = {child.task: child for child in group if child.task is not None and not child.task.done()}
        if not children:
            return
        for child in children.values():
            child.send(signal.SIGTERM)
        _, slow = await asyncio.wait(children, timeout=grace_s)
        for task in slow:
            self._tell(children[task], EventKind.KILLED, f"did not stop within {grace_s:.1f} s and is killed")
            children[task].send(signal.SIGKILL)
        if slow:
            await asyncio.wait(slow, timeout=KILL_DEADLINE_S)

    def _tell(self, child: _Child, kind: EventKind, text: str) -> None:
        if self._on_event is not None:
            self._on_event(ChildEvent(kind=kind, name=child.spec.name, text=f"{child.spec.name} {text}"))


class _Child:
    """One child as the supervisor sees it; its process changes with every restart."""

    def __init__(self, spec: ChildProcess) -> None:
        self.spec = spec
        self.task: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        self.started_at_s = 0.0
        self.log_offset = 0

    def running(self) -> asyncio.subprocess.Process | None:
        return self.process if self.process is not None and self.process.returncode is None else None

    def send(self, number: signal.Signals) -> None:
        if process := self.running():
            _signal_group(process.pid, number)

    def log_tail(self) -> list[str]:
        """Read the last lines that this process wrote, not those of a run before it."""
        with contextlib.suppress(OSError), self.spec.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_offset if self.log_offset <= size else 0, size - LOG_TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
            return [line.rstrip() for line in lines if line.strip()][-LOG_TAIL_LINES:]
        return []


async def _become_ready(child: _Child, process: asyncio.subprocess.Process) -> str | None:
    """Wait until the child is ready, and return None, or the reason why it will not be."""
    spec = child.spec
    if spec.ready is None:
        return None
    while process.returncode is None:
        with contextlib.suppress(OSError, TimeoutError):
            # Another program may listen on the port of a child that has just ended.
            if await asyncio.wait_for(spec.ready(), PROBE_TIMEOUT_S) and process.returncode is None:
                return None
        if time.monotonic() > child.started_at_s + spec.ready_deadline_s:
            child.send(signal.SIGKILL)
            await process.wait()
            return f"was not ready within {spec.ready_deadline_s:g} s"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), PROBE_INTERVAL_S)
    return f"{_describe_exit(process.returncode)} before it was ready"


async def _run_to_the_end(child: _Child, process: asyncio.subprocess.Process) -> str:
    while True:
        with contextlib.suppress(TimeoutError):
            return _describe_exit(await asyncio.wait_for(process.wait(), LOG_CHECK_INTERVAL_S))
        _bound_log(child.spec.log_path)


def _die_with(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends; it runs in the child, before the program."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)


def _signal_group(process_group: int, number: signal.Signals) -> None:
    # macOS raises PermissionError when only zombies are left in the group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process_group, number)


def _bound_log(path: Path) -> None:
    """Move a log that is too long aside. Children append, so they continue at the new end.

    logging's rotation cannot do this: the children write the file, and two of them are not written in Python.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(-exit_code, f'signal {-exit_code}')}"
