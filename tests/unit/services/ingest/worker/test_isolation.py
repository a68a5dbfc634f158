"""Processes of their own for tasks whose file may crash a process: when they count as crashed."""

from __future__ import annotations

import pytest

from services.ingest.worker import isolation
from services.ingest.worker.isolation import CRASHES_MAX, IsolatedTask, Isolation, IsolationFailed, run_child
from shared.kafka.failed_keys import RecordFault
from tests.unit.services.ingest.worker.test_city_day import task_of

BEGIN = "import os, signal, sys; sys.stdin.readline(); print('begun', flush=True); "


def child(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let each child be this program."""
    monkeypatch.setattr(isolation, "CHILD", ("-c", program))


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        (BEGIN, True),
        (BEGIN + "os.kill(os.getpid(), signal.SIGKILL)", False),
        (BEGIN + "os._exit(3)", False),
    ],
    ids=["ends", "killed", "exits"],
)
async def test_a_child_that_ends_early_has_crashed(program: str, ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that has begun, and ends by a signal or an exit code, has crashed."""
    child(monkeypatch, program)
    assert await run_child(IsolatedTask(task_of("0"), 0)) is ended


async def test_a_child_that_cannot_begin_counts_as_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invalid settings, for example, end a child before it begins: the file is not the cause."""
    child(monkeypatch, "raise SystemExit(2)")
    with pytest.raises(IsolationFailed, match="exit code 2"):
        await run_child(IsolatedTask(task_of("0"), 0))


async def test_a_child_that_ends_by_an_exception_has_not_crashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same exception would come again, and the file is not refused for it: the task is set aside."""
    child(monkeypatch, BEGIN + "raise TypeError")
    with pytest.raises(RecordFault):
        await run_child(IsolatedTask(task_of("0"), 0))


async def test_children_are_run_until_one_ends() -> None:
    """Each child is told how many crashed before it. One more than refuse the file is too many."""
    told: list[int] = []

    async def crash(isolated: IsolatedTask) -> bool:
        told.append(isolated.crashes)
        return len(told) == 3

    await Isolation(crash).run(task_of("0"))
    assert told == [0, 1, 2]

    async def always(_isolated: IsolatedTask) -> bool:
        return False

    with pytest.raises(IsolationFailed, match=f"{CRASHES_MAX + 1} processes crashed"):
        await Isolation(always).run(task_of("0"))
