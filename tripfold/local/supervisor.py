"""Supervises child processes: starts them in order, restarts them, and stops them within 10 s.

Each child leads its own session, so Ctrl-C in a terminal reaches only the supervisor. The failures:

- A child ends, or is not ready in time, at its first start: the supervisor gives up with ChildFailed.
- A child ends later: the supervisor restarts it. After RESTARTS_MAX restarts within RESTART_WINDOW_S it gives up.
- A child does not stop within STOP_GRACE_S: the supervisor kills its process group.
- The supervisor is killed with SIGKILL: on Linux the kernel then kills each child (PR_SET_PDEATHSIG).

No library does all of that. circus and supervisord lack readiness checks; simpervisor and mirakuru lack limits for
restarts. None of them kills its children when it is killed itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import enum
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from shared.domain.errors import OperatorError

STOP_GRACE_S = 3.0
KILL_DEADLINE_S = 0.3
PROBE_TIMEOUT_S = 2.0
PROBE_INTERVAL_S = 0.05
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
RESTART_WAIT_S = 0.5
LOG_BYTES_MAX = 16 * 1024**2
LOG_CHECK_INTERVAL_S = 5.0
LOG_TAIL_BYTES = 8 * 1024
LOG_TAIL_LINES = 8

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

Probe = Callable[[], Coroutine[Any, Any, bool]]
"""Returns whether a child is ready. OSError means the same as False."""


class ChildProcess(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a child. The supervisor appends its output to ``log_path``."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    log_path: Path
    ready: Probe
    ready_deadline_s: float = 60.0
    stop_signal: signal.Signals = signal.SIGTERM
    cwd: Path | None = None


class EventKind(enum.StrEnum):
    """The kind of an event."""

    READY = "ready"
    ENDED = "ended"
    RESTARTING = "restarting"
    KILLED = "killed"


class ChildEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event in the life of a child; ``text`` is a line for users."""

    kind: EventKind
    name: str
    text: str


class StopRequested(Exception):
    """SIGINT or SIGTERM ended the supervisor's context."""


class ChildFailed(OperatorError):
    """A child failed, and the supervisor gave up."""

    def __init__(self, name: str, reason: str, log_path: Path, log_lines: Sequence[str] = ()) -> None:
        text = f"{name} {reason} (its log is {log_path})"
        if log_lines:
            text = "\n".join([f"{name} {reason}; the end of {log_path}:", *(f"    {line}" for line in log_lines)])
        super().__init__(text)


def http_probe(url: str) -> Probe:
    """Return a probe that is true once a GET of ``url`` (plain HTTP) returns 200."""

    async def probe() -> bool:
        try:
            # Without verify=False each probe would load the system's certificates.
            client = httpx.AsyncClient(verify=False, trust_env=False, timeout=PROBE_TIMEOUT_S)  # noqa: S501  # no TLS
            async with client:
                return (await client.get(url)).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    return probe


class Supervisor:
    """Runs children inside ``async with``, and stops them at its end, the last group first.

    A supervisor that gives up cancels the task that entered the context; the context then raises ChildFailed. If
    ``handle_signals`` is true (main thread only), SIGINT and SIGTERM end it in the same way, with StopRequested.

    ``on_event`` is called in the event loop. Children inherit ``held_fds``, so that a lock on their data is held until
    the last of them has ended.
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
        self._user: asyncio.Task[Any] | None = None
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._user = asyncio.current_task()
        for number in self._signals:
            asyncio.get_running_loop().add_signal_handler(number, self._give_up, StopRequested())
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stop()
        finally:
            for number in self._signals:
                asyncio.get_running_loop().remove_signal_handler(number)
        if self._failure is not None:
            if (task := asyncio.current_task()) is not None and task is self._user:
                task.uncancel()
            raise self._failure

    async def start(self, *children: ChildProcess) -> None:
        """Start ``children`` concurrently, as a group that also stops together, and wait until all are ready."""
        group = [_Child(spec) for spec in children]
        self._groups.append(group)
        for child in group:
            child.task = asyncio.create_task(self._supervise(child), name=child.spec.name)
            child.task.add_done_callback(self._on_task_done)
        for child in group:
            await child.ready.wait()
        if self._failure is not None:
            raise self._failure

    async def wait(self) -> None:
        """Wait until the supervisor stops. Raises ChildFailed if it gave up."""
        await self._stopping.wait()
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Stop all children, the last group first: their stop signal, then SIGKILL after STOP_GRACE_S."""
        self._stopping.set()
        try:
            for group in reversed(self._groups):
                children = {child.task: child for child in group if child.task is not None}
                for child in group:
                    child.send(child.spec.stop_signal)
                _, slow = await asyncio.wait(children, timeout=STOP_GRACE_S)
                for task in slow:
                    self._tell(children[task], EventKind.KILLED, f"did not stop within {STOP_GRACE_S:g} s; killed it")
                    children[task].send(signal.SIGKILL)
                if slow:
                    await asyncio.wait(slow, timeout=KILL_DEADLINE_S)
        finally:
            for child in self._children():
                child.send(signal.SIGKILL)

    def pid(self, name: str) -> int:
        """Return the process id of a child. Raises LookupError if it does not run now."""
        for child in self._children():
            if child.spec.name == name and (process := child.running()):
                return process.pid
        raise LookupError(f"no child named {name!r} is running")

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process group of a running child, to inject a fault. Raises LookupError."""
        pid = self.pid(name)
        try:
            os.killpg(pid, number)
        except ProcessLookupError as error:  # it has ended, and the event loop has not noticed yet
            raise LookupError(f"no child named {name!r} is running") from error

    def _children(self) -> Iterator[_Child]:
        for group in self._groups:
            yield from group

    def _give_up(self, reason: BaseException) -> None:
        if self._user is not None and not self._stopping.is_set():
            self._stopping.set()
            self._failure = reason
            for child in self._children():
                child.ready.set()  # let start() return
            self._user.cancel()

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(error)

    async def _supervise(self, child: _Child) -> None:
        """Run a child, and restart it, until the supervisor stops. Raises ChildFailed."""
        spec = child.spec
        restarts: deque[float] = deque(maxlen=RESTARTS_MAX)
        while not self._stopping.is_set():
            reason = await self._run(child)
            if self._stopping.is_set():
                return
            self._tell(child, EventKind.ENDED, reason)
            now_s = time.monotonic()
            too_often = len(restarts) == RESTARTS_MAX and restarts[0] > now_s - RESTART_WINDOW_S
            if too_often:
                reason += f", after {RESTARTS_MAX} restarts within {RESTART_WINDOW_S:.0f} s"
            if too_often or not child.ready.is_set():
                raise ChildFailed(spec.name, reason, spec.log_path, child.log_tail())
            restarts.append(now_s)
            self._tell(child, EventKind.RESTARTING, "is restarted")
            await asyncio.sleep(RESTART_WAIT_S)

    async def _run(self, child: _Child) -> str:
        """Run one process of a child until it ends; return the reason."""
        spec = child.spec
        started_s = time.monotonic()
        process = await self._spawn(child)
        try:
            # Another program may listen on the port of a child that has just ended.
            while not (await _is_ready(spec.ready) and process.returncode is None):
                if await _has_ended(process, within_s=PROBE_INTERVAL_S):
                    return f"{_describe_exit(process)} before it was ready"
                if time.monotonic() > started_s + spec.ready_deadline_s:
                    return f"was not ready within {spec.ready_deadline_s:g} s"
            self._tell(child, EventKind.READY, f"ready in {time.monotonic() - started_s:.1f} s")
            child.ready.set()
            while not await _has_ended(process, within_s=LOG_CHECK_INTERVAL_S):
                _bound_log(spec.log_path)
            return _describe_exit(process)
        finally:
            _signal_group(process.pid, signal.SIGKILL)  # it, or what it started
            await process.wait()

    async def _spawn(self, child: _Child) -> asyncio.subprocess.Process:
        spec = child.spec
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        parent_pid = os.getpid()
        with spec.log_path.open("ab") as log:
            child.log_offset = log.tell()
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
                    preexec_fn=lambda: die_with(parent_pid),
                )
            except OSError as error:
                raise ChildFailed(spec.name, f"could not be run: {error}", spec.log_path) from error
        if self._stopping.is_set():
            child.send(spec.stop_signal)  # stop() came before there was a process
        return child.process

    def _tell(self, child: _Child, kind: EventKind, text: str) -> None:
        if self._on_event is not None:
            self._on_event(ChildEvent(kind=kind, name=child.spec.name, text=f"{child.spec.name} {text}"))


class _Child:
    """The state of a child. Its process changes with every restart."""

    def __init__(self, spec: ChildProcess) -> None:
        self.spec = spec
        self.task: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        self.log_offset = 0

    def running(self) -> asyncio.subprocess.Process | None:
        return self.process if self.process is not None and self.process.returncode is None else None

    def send(self, number: signal.Signals) -> None:
        if process := self.running():
            _signal_group(process.pid, number)

    def log_tail(self) -> list[str]:
        """Return the last lines that the latest process logged."""
        lines: list[str] = []
        with contextlib.suppress(FileNotFoundError), self.spec.log_path.open("rb") as log:
            log.seek(max(self.log_offset, self.spec.log_path.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-LOG_TAIL_LINES:]


async def _is_ready(probe: Probe) -> bool:
    with contextlib.suppress(OSError, TimeoutError):
        return await asyncio.wait_for(probe(), PROBE_TIMEOUT_S)
    return False


async def _has_ended(process: asyncio.subprocess.Process, *, within_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), within_s)
    return process.returncode is not None


def die_with(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends. It runs in the child, before the program."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)


def _signal_group(process_group: int, number: signal.Signals) -> None:
    # macOS raises PermissionError when only zombies are left in the group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process_group, number)


def _bound_log(path: Path) -> None:
    """Move a log that is too long aside.

    Children append, so they continue at the new end. The handlers of ``logging`` cannot do this, because the children
    write the file themselves.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)


def _describe_exit(process: asyncio.subprocess.Process) -> str:
    code = process.returncode or 0
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
