"""The supervisor, with children that are a few lines of Python each.

The fault model: a child may end at any moment, never become ready, ignore SIGTERM or leave children of its own; the
supervisor may be interrupted, or killed with -9.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tripfold.local import supervisor as supervisor_module
from tripfold.local.supervisor import (
    ChildEvent,
    ChildFailed,
    ChildProcess,
    EventKind,
    StopRequested,
    Supervisor,
    http_probe,
)

DEADLINE_S = 20.0
SLEEP = "import time; time.sleep(600)"
IGNORE_SIGTERM = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('ready', 'w'); {SLEEP}"
SAY_WHEN_STOPPED = """
import signal, sys, time
def stop(*_):
    with open("stopped", "a") as file:
        file.write(sys.argv[1] + " ")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open("ready-" + sys.argv[1], "w")
time.sleep(600)
"""


def child(directory: Path, name: str, code: str, *, ready_file: str | None = None, **options: object) -> ChildProcess:
    """Describe a child that runs ``code`` in ``directory``, ready once ``ready_file`` is there."""

    async def probe() -> bool:
        return (directory / str(ready_file)).exists()

    return ChildProcess(
        name=name,
        argv=(sys.executable, "-I", "-S", "-c", textwrap.dedent(code), name),
        env={},
        cwd=directory,
        log_path=directory / f"{name}.log",
        ready=None if ready_file is None else probe,
        **options,  # type: ignore[arg-type]  # the struct's own options, passed through
    )


def is_running(pid: int) -> bool:
    """Say whether a process runs; a zombie that its parent has yet to collect does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        # Gone between the two; or a system without /proc, where the signal has told.
        return not Path("/proc/self").exists()


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll until ``condition`` holds, or fail."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited too long until {what}"
        time.sleep(0.01)


async def until(condition: Callable[[], object], what: str) -> None:
    """Poll until ``condition`` holds without holding the event loop, or fail."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited too long until {what}"
        await asyncio.sleep(0.01)


async def test_children_run_inside_the_context_and_not_after_it(tmp_path: Path) -> None:
    """A child runs in a session of its own, writes to its log, and is gone after the context."""
    spec = child(tmp_path, "talker", f"print('hello', flush=True); open('ready', 'w'); {SLEEP}", ready_file="ready")
    async with Supervisor() as supervisor:
        await supervisor.start(spec)
        pid = supervisor.pid("talker")
        assert os.getsid(pid) == pid
        assert (tmp_path / "talker.log").read_text() == "hello\n"
    assert not is_running(pid)


async def test_groups_stop_in_reverse_order(tmp_path: Path) -> None:
    """The group that was started last stops first, and the next group only after it."""
    async with Supervisor() as supervisor:
        await supervisor.start(child(tmp_path, "store", SAY_WHEN_STOPPED, ready_file="ready-store"))
        await supervisor.start(
            child(tmp_path, "api", SAY_WHEN_STOPPED, ready_file="ready-api"),
            child(tmp_path, "worker", SAY_WHEN_STOPPED, ready_file="ready-worker"),
        )
    order = (tmp_path / "stopped").read_text().split()
    assert sorted(order[:2]) == ["api", "worker"]
    assert order[2:] == ["store"]


async def test_a_child_that_ends_before_it_is_ready_fails_the_start(tmp_path: Path) -> None:
    """ChildFailed names the child, its exit code, and the last lines of this run's log alone."""
    (tmp_path / "broken.log").write_text("a line of yesterday\n")
    spec = child(tmp_path, "broken", "print('no disk'); raise SystemExit(3)", ready_file="never")
    with pytest.raises(ChildFailed) as failure:
        async with Supervisor() as supervisor:
            await supervisor.start(spec)
    assert failure.value.log_lines == ("no disk",)
    assert str(failure.value).startswith("broken ended with exit code 3 before it was ready; the end of ")


async def test_a_child_that_is_not_ready_in_time_fails_the_start(tmp_path: Path) -> None:
    """A child that misses its deadline is killed, and the start fails."""
    code = f"import os; print(os.getpid(), flush=True); {IGNORE_SIGTERM}"
    spec = child(tmp_path, "slow", code, ready_file="never", ready_deadline_s=0.5)
    with pytest.raises(ChildFailed, match=r"slow was not ready within 0\.5 s") as failure:
        async with Supervisor() as supervisor:
            await supervisor.start(spec)
    assert not any(is_running(int(line)) for line in failure.value.log_lines)


async def test_a_program_that_does_not_exist_fails_the_start(tmp_path: Path) -> None:
    """A program that cannot be run is a ChildFailed, not a bare OSError."""
    spec = ChildProcess(name="ghost", argv=(str(tmp_path / "ghost"),), env={}, log_path=tmp_path / "ghost.log")
    with pytest.raises(ChildFailed, match="ghost could not be run"):
        async with Supervisor() as supervisor:
            await supervisor.start(spec)


async def test_a_killed_child_that_may_not_restart_ends_the_wait(tmp_path: Path) -> None:
    """A child that may not be restarted ends everything when it is killed, and is named."""
    async with Supervisor() as supervisor:
        await supervisor.start(child(tmp_path, "store", SLEEP))
        await supervisor.start(child(tmp_path, "worker", SLEEP))
        store = supervisor.pid("store")
        supervisor.kill("worker")
        with pytest.raises(ChildFailed, match="worker was killed by SIGKILL"):
            await supervisor.wait()
    assert not is_running(store)


async def test_a_child_killed_during_the_start_of_another_fails_that_start(tmp_path: Path) -> None:
    """While one group starts, the death of a child of another group is not overlooked."""
    async with Supervisor() as supervisor:
        await supervisor.start(child(tmp_path, "first", "import time; time.sleep(0.2); raise SystemExit(7)"))
        with pytest.raises(ChildFailed, match="first ended with exit code 7"):
            await supervisor.start(child(tmp_path, "second", SLEEP, ready_file="never"))


async def test_a_killed_child_is_restarted(tmp_path: Path) -> None:
    """A child that may be restarted comes back with another pid, and its old process group is gone."""
    events: list[ChildEvent] = []
    code = f"""
        import subprocess, sys
        grandchild = subprocess.Popen([sys.executable, "-I", "-S", "-c", {SLEEP!r}])
        print(grandchild.pid, flush=True)
        {SLEEP}
    """
    log = tmp_path / "worker.log"
    async with Supervisor(on_event=events.append) as supervisor:
        await supervisor.start(child(tmp_path, "worker", code, restart=True))
        first = supervisor.pid("worker")
        await until(lambda: log.read_text().endswith("\n"), "the grandchild runs")
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(log.read_text().splitlines()) == 2, "the child runs again")
        assert supervisor.pid("worker") != first
        pids = [first, supervisor.pid("worker"), *map(int, log.read_text().split())]
        assert [is_running(pid) for pid in pids] == [False, True, False, True]
    await until(lambda: not any(is_running(pid) for pid in pids), "all are gone")
    assert [event.kind for event in events] == [
        EventKind.READY,
        EventKind.ENDED,
        EventKind.RESTARTING,
        EventKind.READY,
    ]


async def test_a_child_that_dies_too_often_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts are bounded; the one too many is a ChildFailed that says so."""
    monkeypatch.setattr(supervisor_module, "RESTART_WAIT_MIN_S", 0.0)
    async with Supervisor() as supervisor:
        await supervisor.start(child(tmp_path, "flaky", "print('again')", restart=True))
        with pytest.raises(ChildFailed, match="after 5 restarts within 60 s"):
            await supervisor.wait()
    assert (tmp_path / "flaky.log").read_text() == "again\n" * 6


async def test_a_child_that_is_never_ready_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart that is not ready in time counts as one; the last one is the reason."""
    monkeypatch.setattr(supervisor_module, "RESTART_WAIT_MIN_S", 0.0)
    async with Supervisor() as supervisor:
        (tmp_path / "ready").touch()
        await supervisor.start(child(tmp_path, "slow", SLEEP, ready_file="ready", ready_deadline_s=0.2, restart=True))
        (tmp_path / "ready").unlink()
        os.kill(supervisor.pid("slow"), signal.SIGKILL)
        with pytest.raises(ChildFailed, match=r"was not ready within 0\.2 s, after 5 restarts within 60 s"):
            await supervisor.wait()


async def test_a_child_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ignores SIGTERM is killed when its time is over."""
    monkeypatch.setattr(supervisor_module, "STOP_DEADLINE_S", 0.3)
    events: list[ChildEvent] = []
    async with Supervisor(on_event=events.append) as supervisor:
        await supervisor.start(child(tmp_path, "stubborn", IGNORE_SIGTERM, ready_file="ready"))
        pid = supervisor.pid("stubborn")
    assert not is_running(pid)
    assert events[-1].kind is EventKind.KILLED


async def test_a_stop_during_a_start_leaves_nothing(tmp_path: Path) -> None:
    """A stop that is requested during a start raises StopRequested, and no child is left."""
    pids: list[int] = []
    supervisor = Supervisor()

    def stop() -> None:
        pids.append(supervisor.pid("slow"))
        supervisor.request_stop()

    asyncio.get_running_loop().call_later(0.5, stop)
    with pytest.raises(StopRequested):
        async with supervisor:
            await supervisor.start(child(tmp_path, "slow", SLEEP, ready_file="never"))
    assert len(pids) == 1
    assert not is_running(pids[0])


async def test_leftovers_are_removed(tmp_path: Path) -> None:
    """A file that a killed child leaves behind is removed."""
    leftover = tmp_path / "ready"
    async with Supervisor() as supervisor:
        await supervisor.start(
            child(tmp_path, "one", IGNORE_SIGTERM, ready_file="ready", leftovers=(leftover,), restart=True)
        )
        supervisor.kill("one")
        supervisor.request_stop()
    assert not leftover.exists()


async def test_a_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that has grown too long is moved aside while its child goes on writing."""
    monkeypatch.setattr(supervisor_module, "LOG_BYTES_MAX", 10_000)
    monkeypatch.setattr(supervisor_module, "LOG_CHECK_INTERVAL_S", 0.02)
    code = "import time\nwhile True: print('x' * 999, flush=True); time.sleep(0.001)"
    aside = tmp_path / "talker.log.1"
    async with Supervisor() as supervisor:
        await supervisor.start(child(tmp_path, "talker", code))
        await until(aside.exists, "the log is moved aside")
        await until(lambda: (tmp_path / "talker.log").stat().st_size > 0, "the child writes on")
    assert not (tmp_path / "talker.log").read_bytes().startswith(b"\0")


async def test_the_http_probe_waits_for_status_200() -> None:
    """The HTTP probe takes only the status 200 for ready, and passes path, query and headers on."""
    status, requests = b"503 Not yet", list[bytes]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        probe = http_probe(f"http://127.0.0.1:{port}/health?deep=1", headers=lambda: {"X-Key": "k"})
        assert not await probe()
        status = b"200 OK"
        assert await probe()
    lines = requests[0].decode().splitlines()
    assert lines[0] == "GET /health?deep=1 HTTP/1.1"
    assert {"X-Key: k", f"Host: 127.0.0.1:{port}"} <= set(lines)


SUPERVISED = """
import asyncio, sys
from pathlib import Path
from tests.unit.tripfold.local.test_supervisor import SAY_WHEN_STOPPED, child
from tripfold.local.supervisor import Supervisor

async def main(directory):
    async with Supervisor(handle_signals=True) as s:
        await s.start(child(directory, "store", SAY_WHEN_STOPPED, ready_file="ready-store"))
        await s.start(child(directory, "api", SAY_WHEN_STOPPED, ready_file="ready-api"))
        print(s.pid("store"), s.pid("api"), flush=True)
        await s.wait()
    print("left in order", flush=True)

asyncio.run(main(Path(sys.argv[1])))
"""


def run_supervised(directory: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Run a supervisor in a process of its own; return it and the pids of its two children."""
    process = subprocess.Popen([sys.executable, "-c", SUPERVISED, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM stop the children in order, and the program goes on after the context."""
    process, pids = run_supervised(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert output == "left in order\n"
    assert (tmp_path / "stopped").read_text() == "api store "
    assert not any(is_running(pid) for pid in pids)


def test_a_killed_supervisor_leaves_no_child(tmp_path: Path) -> None:
    """After kill -9 of the supervisor its children end too."""
    process, pids = run_supervised(tmp_path)
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    assert len(pids) == 2
    wait_until(lambda: not any(is_running(pid) for pid in pids), "the children are gone")
