"""The supervisor, with children that are a few lines of Python.

The faults: a child ends at any moment, is never ready, ignores SIGTERM or starts children of its own; the supervisor is
interrupted, or killed with SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tripfold.local import supervisor as supervisor_module
from tripfold.local.supervisor import (
    ChildEvent,
    ChildFailed,
    ChildProcess,
    EventKind,
    Supervisor,
    http_probe,
)

DEADLINE_S = 20.0
READY = "from pathlib import Path; import sys; Path('ready-' + sys.argv[1]).touch()"
SLEEP = f"{READY}; import time; time.sleep(600)"
IGNORE_SIGTERM = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
LOG_THE_STOP = f"""
import signal, sys
def stop(*_):
    with open("stopped", "a") as file:
        file.write(sys.argv[1] + " ")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
{SLEEP}
"""


def child(directory: Path, name: str, code: str, *, deadline_s: float = 30.0) -> ChildProcess:
    """Describe a child that runs ``code`` in ``directory``; it is ready once the file ``ready-NAME`` exists."""

    async def probe() -> bool:
        return (directory / f"ready-{name}").exists()

    return ChildProcess(
        name=name,
        argv=(sys.executable, "-I", "-S", "-c", textwrap.dedent(code), name),
        env={},
        cwd=directory,
        log_path=directory / f"{name}.log",
        ready=probe,
        ready_deadline_s=deadline_s,
    )


def is_running(pid: int) -> bool:
    """Return whether a process runs. A zombie does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # a system without /proc


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited too long until {what}"
        time.sleep(0.01)


async def until(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


@pytest.fixture(autouse=True)
def restart_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restart children without a pause."""
    monkeypatch.setattr(supervisor_module, "RESTART_WAIT_S", 0.0)


async def test_groups_start_in_order_and_stop_in_reverse_order(tmp_path: Path) -> None:
    """A group starts once the group before it is ready, and stops before it."""
    events: list[ChildEvent] = []
    async with Supervisor(on_event=events.append) as supervisor:
        await supervisor.start(child(tmp_path, "store", LOG_THE_STOP))
        await supervisor.start(child(tmp_path, "api", LOG_THE_STOP), child(tmp_path, "worker", LOG_THE_STOP))
        pids = [supervisor.pid(name) for name in ("store", "api", "worker")]
    assert [event.kind for event in events] == [EventKind.READY] * 3
    assert events[0].name == "store"
    order = (tmp_path / "stopped").read_text().split()
    assert sorted(order[:2]) == ["api", "worker"]
    assert order[2:] == ["store"]
    assert not any(is_running(pid) for pid in pids)


async def test_a_child_that_ends_before_it_is_ready_fails_the_start(tmp_path: Path) -> None:
    """ChildFailed names the child, its exit code, and the last lines that this process logged."""
    (tmp_path / "broken.log").write_text("a line of yesterday\n")
    with pytest.raises(ChildFailed) as failure:
        async with Supervisor() as supervisor:
            await supervisor.start(child(tmp_path, "broken", "print('no disk'); raise SystemExit(3)"))
    log = tmp_path / "broken.log"
    assert str(failure.value) == f"broken ended with exit code 3 before it was ready; the end of {log}:\n    no disk"


async def test_another_program_on_the_port_does_not_make_a_child_ready(tmp_path: Path) -> None:
    """A child that ended during its probe fails the start, although the probe is true."""
    supervisor = Supervisor()

    async def probe() -> bool:
        with contextlib.suppress(LookupError):
            while supervisor.pid("broken"):  # noqa: ASYNC110  # another process has no event
                await asyncio.sleep(0.01)
        return True

    spec = msgspec.structs.replace(child(tmp_path, "broken", "raise SystemExit(3)"), ready=probe)
    with pytest.raises(ChildFailed, match="broken ended with exit code 3 before it was ready"):
        async with supervisor:
            await supervisor.start(spec)


async def test_a_child_that_is_not_ready_in_time_fails_the_start(tmp_path: Path) -> None:
    """A child that misses its deadline is killed, and the start fails."""
    supervisor = Supervisor()
    pids: set[int] = set()

    async def probe() -> bool:
        pids.add(supervisor.pid("slow"))
        return False

    spec = child(tmp_path, "slow", "import time; time.sleep(600)", deadline_s=0.1)
    with pytest.raises(ChildFailed, match=r"slow was not ready within 0\.1 s"):
        async with supervisor:
            await supervisor.start(msgspec.structs.replace(spec, ready=probe))
    assert [is_running(pid) for pid in pids] == [False]


async def test_a_program_that_does_not_exist_fails_the_start(tmp_path: Path) -> None:
    """A program that cannot be run raises ChildFailed."""
    ghost = msgspec.structs.replace(child(tmp_path, "ghost", ""), argv=(str(tmp_path / "ghost"),))
    with pytest.raises(ChildFailed, match="ghost could not be run"):
        async with Supervisor() as supervisor:
            await supervisor.start(ghost)


async def test_a_killed_child_is_restarted(tmp_path: Path) -> None:
    """A killed child gets a new process, and the rest of its old process group is killed."""
    events: list[ChildEvent] = []
    code = f"""
        import subprocess, sys
        grandchild = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
        print(grandchild.pid, flush=True)
        {SLEEP}
    """
    log = tmp_path / "worker.log"
    async with Supervisor(on_event=events.append) as supervisor:
        await supervisor.start(child(tmp_path, "worker", code))
        first = supervisor.pid("worker")
        os.kill(first, signal.SIGKILL)
        # A child can log before the supervisor has its process id, and the file that makes it ready is still there.
        await until(lambda: len(events) == 4, "the child is ready again")
        await until(lambda: len(log.read_text().splitlines()) == 2, "the child has started another")
        pids = [first, supervisor.pid("worker"), *map(int, log.read_text().split())]
        await until(lambda: [is_running(pid) for pid in pids] == [False, True, False, True], "the old group is killed")
    await until(lambda: not any(is_running(pid) for pid in pids), "all have ended")
    kinds = [EventKind.READY, EventKind.ENDED, EventKind.RESTARTING, EventKind.READY]
    assert [event.kind for event in events] == kinds
    assert events[1].text == "worker was killed by SIGKILL"


async def test_a_signal_to_a_child_that_has_just_ended_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system knows that a child has ended before the event loop does."""

    def gone(*_: int) -> None:
        raise ProcessLookupError

    async with Supervisor() as supervisor:
        await supervisor.start(child(tmp_path, "worker", SLEEP))
        with monkeypatch.context() as patch:
            patch.setattr(os, "killpg", gone)
            with pytest.raises(LookupError, match="no child named 'worker' is running"):
                supervisor.kill("worker")


async def test_a_child_that_ends_too_often_ends_the_context(tmp_path: Path) -> None:
    """After five restarts the supervisor cancels its user, stops the others, and says why."""
    pids = []

    async def use() -> None:
        async with Supervisor() as supervisor:
            await supervisor.start(child(tmp_path, "store", SLEEP))
            pids.append(supervisor.pid("store"))
            code = f"""
                print("again", flush=True)
                {READY}
                import time
                while not Path("end").exists():
                    time.sleep(0.01)
                sys.exit(7)
            """
            await supervisor.start(child(tmp_path, "flaky", code))
            (tmp_path / "end").touch()
            await asyncio.sleep(600)

    reason = r"flaky ended with exit code 7( before it was ready)?, after 5 restarts within 60 s"
    with pytest.raises(ChildFailed, match=reason):
        await use()
    assert [is_running(pid) for pid in pids] == [False]
    assert (tmp_path / "flaky.log").read_text() == "again\n" * 6


async def test_a_child_that_is_never_ready_again_ends_the_context(tmp_path: Path) -> None:
    """A restart that is not ready in time counts as one; the last one is the reason."""

    async def use() -> None:
        async with Supervisor() as supervisor:
            ready = tmp_path / "ready-slow"
            ready.touch()
            await supervisor.start(child(tmp_path, "slow", "import time; time.sleep(600)", deadline_s=0.1))
            ready.unlink()
            supervisor.kill("slow")
            await supervisor.wait()

    with pytest.raises(ChildFailed, match=r"slow was not ready within 0\.1 s, after 5 restarts within 60 s"):
        await use()


async def test_a_start_in_another_task_fails(tmp_path: Path) -> None:
    """A start raises ChildFailed also in a task that does not own the context."""
    supervisor = Supervisor()

    async def use() -> None:
        async with supervisor:
            await asyncio.sleep(600)

    user = asyncio.create_task(use())
    await asyncio.sleep(0)
    for work in (supervisor.start(child(tmp_path, "broken", "raise SystemExit(3)")), user):
        with pytest.raises(ChildFailed, match="broken ended with exit code 3"):
            await work


async def test_a_child_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ignores SIGTERM is killed after its grace."""
    monkeypatch.setattr(supervisor_module, "STOP_GRACE_S", 0.3)
    monkeypatch.setattr(supervisor_module, "KILL_DEADLINE_S", DEADLINE_S)
    events: list[ChildEvent] = []
    async with Supervisor(on_event=events.append) as supervisor:
        await supervisor.start(child(tmp_path, "stubborn", IGNORE_SIGTERM))
        pid = supervisor.pid("stubborn")
    assert not is_running(pid)
    assert events[-1].kind is EventKind.KILLED


def test_three_groups_stop_within_ten_seconds() -> None:
    """A local stack has three groups; stopping them takes less than 10 s even if each must be killed."""
    assert 3 * (supervisor_module.STOP_GRACE_S + supervisor_module.KILL_DEADLINE_S) < 10


async def test_a_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is too long is moved aside while its child continues to write."""
    monkeypatch.setattr(supervisor_module, "LOG_BYTES_MAX", 10_000)
    monkeypatch.setattr(supervisor_module, "LOG_CHECK_INTERVAL_S", 0.02)
    code = f"{READY}; import time\nwhile True: print('x' * 999, flush=True); time.sleep(0.001)"
    async with Supervisor() as supervisor:
        await supervisor.start(child(tmp_path, "talker", code))
        await until((tmp_path / "talker.log.1").exists, "the log is moved aside")
        await until(lambda: (tmp_path / "talker.log").stat().st_size > 0, "the child writes on")
    assert not (tmp_path / "talker.log").read_bytes().startswith(b"\0")


async def test_the_http_probe_waits_for_status_200(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is true for status 200 only, and false while the port is closed."""
    monkeypatch.setattr(supervisor_module, "PROBE_TIMEOUT_S", DEADLINE_S)
    status = b"503 Not yet"

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /health?deep=1 HTTP/1.1\r\n")
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        probe = http_probe(f"http://127.0.0.1:{port}/health?deep=1")
        assert not await probe()
        status = b"200 OK"
        assert await probe()
    assert not await probe()


SUPERVISED = """
import asyncio, sys
from pathlib import Path
from tests.unit.tripfold.local.test_supervisor import LOG_THE_STOP, child
from tripfold.local.supervisor import StopRequested, Supervisor

async def main(directory):
    try:
        async with Supervisor(handle_signals=True) as s:
            await s.start(child(directory, "store", LOG_THE_STOP))
            await s.start(child(directory, "api", LOG_THE_STOP))
            print(s.pid("store"), s.pid("api"), flush=True)
            if sys.argv[2] == "starting":
                await s.start(child(directory, "slow", "import time; time.sleep(600)"))
            await asyncio.sleep(600)
    except StopRequested:
        print("stopped in order", flush=True)

asyncio.run(main(Path(sys.argv[1])))
"""


def run_supervised(directory: Path, state: str = "running") -> tuple[subprocess.Popen[str], list[int]]:
    """Run a supervisor in its own process; return it and the pids of its children."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISED, str(directory), state], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(os.getsid(pid) == pid for pid in pids)
    return process, pids


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGINT, "running"), (signal.SIGTERM, "running"), (signal.SIGINT, "starting")]
)
def test_an_interrupt_stops_in_order(tmp_path: Path, number: signal.Signals, state: str) -> None:
    """SIGINT and SIGTERM stop the children in order, also during a start; the program then continues."""
    process, pids = run_supervised(tmp_path, state)
    process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert output == "stopped in order\n"
    assert (tmp_path / "stopped").read_text() == "api store "
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a killed parent")
def test_a_killed_supervisor_leaves_no_child(tmp_path: Path) -> None:
    """After SIGKILL of the supervisor, the kernel kills its children."""
    process, pids = run_supervised(tmp_path)
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    wait_until(lambda: not any(is_running(pid) for pid in pids), "the children have ended")
