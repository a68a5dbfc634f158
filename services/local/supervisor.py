"""Runs a set of child processes under one supervisor: starts them in order, restarts them, leaves none behind.

Each child has a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone, which then stops the
children in the reverse of the order in which they were started. What can go wrong, and what happens then:

- A child ends before it is ready, or is not ready in time: ``start`` raises ChildFailed with its last log lines.
- A child ends later: with ``restart=True`` it is started again; otherwise, or when it dies too often, ``wait`` raises
  ChildDied. One that others kill with -9 has not died of itself: it is started again however often that happens, so
  that whoever kills one child at random does not end all of them.
- A child does not stop: after its share of STOP_DEADLINE_S its whole process group is killed.
- The supervisor itself is killed with -9: a watchdog, one small process that holds the other end of a pipe, sees the
  pipe close and stops the children in the same order, first with SIGTERM. A pipe works alike on Linux and macOS and
  lets a broker write its snapshot, neither of which PR_SET_PDEATHSIG does. What it does not cover is a supervisor
  that dies in the instant between starting a child and telling the watchdog about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec

from shared.errors import OperatorError

STOP_DEADLINE_S = 9.0
KILL_DEADLINE_S = 2.0
GROUP_POLL_INTERVAL_S = 0.01
PROBE_TIMEOUT_S = 2.0
PROBE_INTERVAL_S = 0.03
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
RESTART_WAIT_MIN_S = 0.1
RESTART_WAIT_MAX_S = 5.0
LOG_BYTES_MAX = 16 * 1024**2
LOG_CHECK_INTERVAL_S = 5.0
STATUS_LINE_BYTES_MAX = 4096
LOG_TAIL_BYTES = 8 * 1024
LOG_TAIL_LINES = 8
# Wrappers such as package runners pass on a Ctrl-C that the terminal has already sent to everybody.
SAME_SIGNAL_WITHIN_S = 0.3

Probe = Callable[[], Awaitable[bool]]
"""Says whether a child is ready. False, OSError and TimeoutError all mean not yet."""


class ChildProcess(msgspec.Struct, frozen=True, kw_only=True):
    """How to run one child.

    Its output is appended to ``log_path``, whose directory is made if need be. Without a ``ready`` probe it counts
    as ready once it runs. ``leftovers`` are files that it may leave behind when killed, removed after it has ended.
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

    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    KILLED = "killed"


class ChildEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a child; ``text`` says it in a line for people."""

    kind: EventKind
    name: str
    pid: int | None
    text: str


class StopRequested(Exception):
    """Somebody asked the supervisor to stop while it was starting a child."""


class ChildFailed(OperatorError):
    """A child never became ready. ``exit_code`` is None if it ran but was not ready in time, or never ran."""

    def __init__(self, name: str, exit_code: int | None, reason: str, log_path: Path, log_lines: Sequence[str]) -> None:
        super().__init__(_with_log(f"{name} {reason}", log_path, log_lines))
        self.name = name
        self.exit_code = exit_code
        self.log_lines = tuple(log_lines)


class ChildDied(OperatorError):
    """A child that was ready ended for good, without being asked to. ``exit_code`` is negative for a signal."""

    def __init__(self, name: str, exit_code: int, reason: str, log_path: Path, log_lines: Sequence[str]) -> None:
        super().__init__(_with_log(f"{name} {reason}", log_path, log_lines))
        self.name = name
        self.exit_code = exit_code
        self.log_lines = tuple(log_lines)


def http_probe(
    url: str,
    *,
    method: str = "GET",
    headers: Callable[[], Mapping[str, str]] | None = None,
    statuses: Collection[int] = (200,),
) -> Probe:
    """Make a probe that says ready once ``url``, plain HTTP, answers with one of the statuses.

    ``headers`` is called for each request, because a signature holds the time.
    """
    parts = urlsplit(url)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"

    async def probe() -> bool:
        sent = {**(headers() if headers else {}), "Host": parts.netloc, "Connection": "close"}
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=STATUS_LINE_BYTES_MAX)
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode())
            return (await reader.readline()).split()[1:2] in [[b"%d" % status] for status in statuses]
        except ValueError:
            # The line is longer than the limit: whatever answers there does not speak HTTP.
            return False
        finally:
            writer.close()

    return probe


class Supervisor:
    """Children as an async context: they run inside ``async with``, and none is left after it.

    ``on_event`` is called in the event loop for everything that happens to a child. With ``handle_signals``
    (main thread only) SIGINT and SIGTERM request a stop, and a second one kills at once. ``held_fds`` stay open
    until the last child is gone, even if the supervisor is killed: a lock on the children's data belongs there.
    """

    def __init__(
        self,
        *,
        on_event: Callable[[ChildEvent], None] | None = None,
        handle_signals: bool = False,
        held_fds: Sequence[int] = (),
    ) -> None:
        self._on_event = on_event
        self._handle_signals = handle_signals
        self._held_fds = tuple(held_fds)
        self._groups: list[list[_Child]] = []
        self._watchdog: subprocess.Popen[str] | None = None
        self._ending = asyncio.Event()
        self._failure: Exception | None = None
        self._stop_requested_at_s = 0.0

    async def __aenter__(self) -> Self:
        self._start_watchdog()
        if self._handle_signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            await self.stop()
        finally:
            if self._handle_signals:
                for number in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().remove_signal_handler(number)
        return isinstance(error, StopRequested)

    @property
    def failure(self) -> Exception | None:
        """Why a child is gone for good, if one is."""
        return self._failure

    async def start(self, *children: ChildProcess) -> None:
        """Start ``children`` side by side, as one group that also stops together, and wait until all are ready.

        Raises ChildFailed if one of them does not become ready, ChildDied if one started before dies for good
        meanwhile, StopRequested if the supervisor is to stop; leaving ``async with`` by that one is not an error.
        """
        for spec in children:
            if any(child.spec.name == spec.name for child in self._children()):
                raise ValueError(f"two children have the name {spec.name!r}")
        self._raise_if_ending()
        group = [_Child(spec) for spec in children]
        self._groups.append(group)
        for child in group:
            child.life = asyncio.create_task(self._live(child), name=f"life of {child.spec.name}")
            child.life.add_done_callback(self._on_life_done)
        waits: list[asyncio.Task[Any]] = [
            asyncio.create_task(_all_ready(group)),
            asyncio.create_task(self._ending.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._raise_if_ending()

    async def wait(self) -> None:
        """Wait until a stop is requested. Raises ChildDied if a child dies for good before that."""
        await self._ending.wait()
        if self._failure is not None:
            raise self._failure

    def request_stop(self) -> None:
        """Let ``wait`` return and no child start again; the children run until the context is left."""
        self._ending.set()

    async def stop(self) -> None:
        """Stop all children: the group started last first, each with SIGTERM, and SIGKILL when its time is over."""
        self._ending.set()
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        try:
            for groups_left in range(len(self._groups), 0, -1):
                # What a group does not need of its share goes to the groups after it.
                grace_s = max(0.0, deadline_s - time.monotonic()) / groups_left
                await self._stop_group(self._groups[groups_left - 1], grace_s)
        finally:
            self._kill_all()
            self._end_watchdog()

    def pid(self, name: str) -> int:
        """Give the process id of a running child. Raises LookupError if it is not running (just) now."""
        for child in self._children():
            if child.spec.name == name and child.running:
                return child.pid
        raise LookupError(f"no child named {name!r} is running")

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a running child and all of its process group, as a fault from outside would."""
        _signal_group(self.pid(name), number)

    def _children(self) -> Iterator[_Child]:
        for group in self._groups:
            yield from group

    def _raise_if_ending(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._ending.is_set():
            raise StopRequested

    async def _live(self, child: _Child) -> None:
        """Run one child until it has ended for good, then say why."""
        spec = child.spec
        restarts: deque[_Restart] = deque(maxlen=RESTARTS_MAX)
        while True:
            await self._spawn(child)
            reason = await self._become_ready(child)
            if reason is None:
                self._say(child, EventKind.READY, f"{spec.name} ready in {child.age_s():.1f} s")
                child.ready.set()
                reason = await self._run_to_the_end(child)
            exit_code = await self._clear_away(child)
            if self._ending.is_set():
                return
            self._say(child, EventKind.ENDED, f"{spec.name} {reason}")
            if not child.ready.is_set():
                raise ChildFailed(spec.name, exit_code, reason, spec.log_path, child.log_tail())
            if not spec.restart:
                raise ChildDied(spec.name, exit_code, reason, spec.log_path, child.log_tail())
            while restarts and restarts[0].at_s < time.monotonic() - RESTART_WINDOW_S:
                restarts.popleft()
            of_itself = exit_code != -signal.SIGKILL or child.was_too_slow
            if of_itself and sum(one.of_itself for one in restarts) == RESTARTS_MAX:
                reason += f", after {RESTARTS_MAX} restarts within {RESTART_WINDOW_S:.0f} s"
                raise ChildDied(spec.name, exit_code, reason, spec.log_path, child.log_tail())
            wait_s = min(RESTART_WAIT_MIN_S * 2 ** len(restarts), RESTART_WAIT_MAX_S)
            self._say(child, EventKind.RESTARTING, f"{spec.name} is started again in {wait_s:.1f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), timeout=wait_s)
                return
            restarts.append(_Restart(at_s=time.monotonic(), of_itself=of_itself))

    async def _spawn(self, child: _Child) -> None:
        spec = child.spec
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
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
                )
            except OSError as error:
                raise ChildFailed(spec.name, None, f"could not be run: {error}", spec.log_path, ()) from error
        self._tell_watchdog()
        self._say(child, EventKind.STARTING, f"starting {spec.name}")
        if self._ending.is_set():
            # The stop was requested while the process was being made, and has not seen it.
            _signal_group(child.pid, signal.SIGTERM)

    async def _become_ready(self, child: _Child) -> str | None:
        """Wait until the child is ready, and return None, or the reason why it will not be."""
        spec = child.spec
        if spec.ready is None:
            return None
        ended = asyncio.ensure_future(child.wait())
        deadline_s = child.started_at_s + spec.ready_deadline_s
        try:
            while not ended.done():
                if time.monotonic() > deadline_s:
                    child.was_too_slow = True
                    _signal_group(child.pid, signal.SIGKILL)
                    return f"was not ready within {spec.ready_deadline_s:g} s"
                with contextlib.suppress(OSError, TimeoutError):
                    if await asyncio.wait_for(spec.ready(), timeout=PROBE_TIMEOUT_S) and not ended.done():
                        return None
                await asyncio.wait({ended}, timeout=PROBE_INTERVAL_S)
        finally:
            ended.cancel()
        return f"{_describe_exit(await child.wait())} before it was ready"

    async def _run_to_the_end(self, child: _Child) -> str:
        while True:
            try:
                return _describe_exit(await asyncio.wait_for(child.wait(), timeout=LOG_CHECK_INTERVAL_S))
            except TimeoutError:
                _bound_log(child.spec.log_path)

    async def _clear_away(self, child: _Child) -> int:
        """See the child's end, and the end of what it started; return its exit code."""
        exit_code = await child.wait()
        deadline_s = time.monotonic() + KILL_DEADLINE_S
        while _group_runs(child.pid) and time.monotonic() < deadline_s:
            _signal_group(child.pid, signal.SIGKILL)
            await asyncio.sleep(GROUP_POLL_INTERVAL_S)
        child.running = False
        self._tell_watchdog()
        for path in child.spec.leftovers:
            path.unlink(missing_ok=True)
        return exit_code

    async def _stop_group(self, group: Sequence[_Child], grace_s: float) -> None:
        lives = {child.life: child for child in group if child.life is not None and not child.life.done()}
        stopping = {life for life, child in lives.items() if child.running}
        for life in stopping:
            self._say(lives[life], EventKind.STOPPING, f"stopping {lives[life].spec.name}")
            _signal_group(lives[life].pid, signal.SIGTERM)
        asked_at_s = time.monotonic()
        waiting = set(lives)
        while waiting and (left_s := asked_at_s + grace_s - time.monotonic()) > 0:
            done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for life in done & stopping:
                took_s = time.monotonic() - asked_at_s
                self._say(lives[life], EventKind.STOPPED, f"{lives[life].spec.name} stopped in {took_s:.1f} s")
        for life in waiting:
            name = lives[life].spec.name
            self._say(lives[life], EventKind.KILLED, f"{name} did not stop within {grace_s:.1f} s and is killed")
            if lives[life].running:
                _signal_group(lives[life].pid, signal.SIGKILL)
        if waiting:
            await asyncio.wait(waiting, timeout=KILL_DEADLINE_S)

    def _on_life_done(self, life: asyncio.Task[None]) -> None:
        if life.cancelled():
            return
        error = life.exception()
        if error is None or self._failure is not None:
            return
        self._failure = error if isinstance(error, Exception) else RuntimeError(f"supervising failed: {error!r}")
        self._ending.set()

    def _on_signal(self) -> None:
        if not self._ending.is_set():
            self._stop_requested_at_s = time.monotonic()
            self.request_stop()
        elif time.monotonic() - self._stop_requested_at_s > SAME_SIGNAL_WITHIN_S:
            self._kill_all()

    def _kill_all(self) -> None:
        for child in self._children():
            if child.running:
                _signal_group(child.pid, signal.SIGKILL)

    def _say(self, child: _Child, kind: EventKind, text: str) -> None:
        if self._on_event is not None:
            self._on_event(
                ChildEvent(kind=kind, name=child.spec.name, pid=child.pid if child.running else None, text=text)
            )

    def _start_watchdog(self) -> None:
        program = Path(__file__).with_name("watchdog.py")
        self._watchdog = subprocess.Popen(  # noqa: S603  # our own interpreter and our own file
            [sys.executable, "-I", "-S", str(program)],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            pass_fds=self._held_fds,
            start_new_session=True,
        )

    def _tell_watchdog(self) -> None:
        if self._watchdog is None or self._watchdog.stdin is None:
            return
        groups = [[child.pid for child in group if child.running] for group in reversed(self._groups)]
        # Somebody who ends the watchdog takes away the last resort, not the children.
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(json.dumps(groups) + "\n")
            self._watchdog.stdin.flush()

    def _end_watchdog(self) -> None:
        if self._watchdog is None or self._watchdog.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.close()
        # Whatever it finds to do is bounded, and it goes on by itself if it takes longer than this.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(timeout=KILL_DEADLINE_S)
        self._watchdog = None


class BackgroundSupervisor:
    """A Supervisor in a thread of its own, for callers without an event loop, such as synchronous test fixtures."""

    def __init__(self, *, on_event: Callable[[ChildEvent], None] | None = None, held_fds: Sequence[int] = ()) -> None:
        self._on_event = on_event
        self._held_fds = tuple(held_fds)
        self._loop: asyncio.AbstractEventLoop
        self._stop_asked: asyncio.Event
        entered: Future[Supervisor] = Future()
        # A daemon: a program that forgets to stop it still ends, and the watchdog then stops the children.
        self._thread = threading.Thread(target=self._run, args=(entered,), name="supervisor", daemon=True)
        self._thread.start()
        self._supervisor = entered.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *children: ChildProcess) -> None:
        """Do as ``Supervisor.start`` does. If it fails, everything is stopped before the error is raised."""
        try:
            asyncio.run_coroutine_threadsafe(self._supervisor.start(*children), self._loop).result()
        except BaseException:
            self._join()
            raise

    def stop(self) -> None:
        """Stop all children and the thread; the second time nothing happens.

        Raises ChildDied if a child had been seen to die for good before. A death in the same instant as the stop
        is taken for the stop.
        """
        if self._thread.is_alive():
            self._join()
            if self._supervisor.failure is not None:
                raise self._supervisor.failure

    def pid(self, name: str) -> int:
        """Give the process id of a running child. Raises LookupError if it is not running (just) now."""
        return self._supervisor.pid(name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a running child and all of its process group, as a fault from outside would."""
        self._supervisor.kill(name, number)

    def _join(self) -> None:
        self._loop.call_soon_threadsafe(self._stop_asked.set)
        self._thread.join()

    def _run(self, entered: Future[Supervisor]) -> None:
        try:
            asyncio.run(self._supervise(entered))
        except BaseException as error:
            if entered.done():
                raise
            entered.set_exception(error)

    async def _supervise(self, entered: Future[Supervisor]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop_asked = asyncio.Event()
        async with Supervisor(on_event=self._on_event, held_fds=self._held_fds) as supervisor:
            entered.set_result(supervisor)
            await self._stop_asked.wait()


class _Restart(msgspec.Struct, frozen=True):
    """When a child was started again, and whether it had died of itself."""

    at_s: float
    of_itself: bool


class _Child:
    """One child as the supervisor sees it; its process changes with every restart."""

    def __init__(self, spec: ChildProcess) -> None:
        self.spec = spec
        self.life: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        self.running = False
        self.was_too_slow = False
        self.started_at_s = 0.0
        self.log_offset = 0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, f"{self.spec.name} has not been started"
        return self._process

    @process.setter
    def process(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.running = True
        self.was_too_slow = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def age_s(self) -> float:
        return time.monotonic() - self.started_at_s

    async def wait(self) -> int:
        return await self.process.wait()

    def log_tail(self) -> list[str]:
        """Read the last lines that this process wrote, not those of a run before it."""
        try:
            with self.spec.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self.log_offset if self.log_offset <= size else 0, size - LOG_TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [line.rstrip() for line in text.splitlines() if line.strip()][-LOG_TAIL_LINES:]


async def _all_ready(group: Sequence[_Child]) -> None:
    for child in group:
        await child.ready.wait()


def _signal_group(process_group: int, number: signal.Signals) -> None:
    # A child leads the group of its session; macOS answers PermissionError when only zombies are left in it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process_group, number)


def _group_runs(process_group: int) -> bool:
    """Say whether a group whose leader has been collected still has a process that runs.

    Its orphans stay zombies until the first process of the system collects them, which may take seconds: only where
    /proc tells zombies apart are those not waited for.
    """
    try:
        os.killpg(process_group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    if not Path("/proc/self/stat").exists():
        return True
    for stat_path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # After the name in parentheses: state, parent, process group.
            state, _, group = stat_path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(group) == process_group and state != "Z":
                return True
    return False


def _bound_log(path: Path) -> None:
    """Move a log that has grown too long aside; what is written in the same instant may be lost.

    The children write with O_APPEND, so that they go on at the new end.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def _with_log(sentence: str, log_path: Path, log_lines: Sequence[str]) -> str:
    if not log_lines:
        return f"{sentence} (its log is {log_path})"
    return "\n".join([f"{sentence}; the end of {log_path}:", *(f"    {line}" for line in log_lines)])
