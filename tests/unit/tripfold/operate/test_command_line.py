"""How far a command is: a bar at a terminal, lines in a log."""

from __future__ import annotations

import datetime as dt
import io
import re

import pytest
from rich.console import Console

from tests.fakes.bucket import NOON
from tests.fakes.builders import Clock
from tripfold.operate import command_line
from tripfold.operate.command_line import PLAIN_INTERVAL_S, progress_bar


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal there is a bar with what is done, the remark, and the time left."""
    shown = io.StringIO()
    monkeypatch.setattr(command_line, "progress_console", Console(file=shown, force_terminal=True, width=120))
    with progress_bar("reading the topic", "") as show:
        show(0, 9, "0 events/s")
        show(7, 9, "1,234 events/s")
    last = shown.getvalue().rpartition("reading the topic")[2]
    assert "7/9" in last
    assert "1,234 events/s" in last
    assert re.search(r"left.*\d:\d\d:\d\d|left.*-:--:--", last)


def test_progress_is_an_occasional_line_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal progress is a plain line in so many seconds, with how much is done and the time left."""
    clock = Clock(NOON)
    with progress_bar("verifying [/x]", "dates", clock_s=lambda: (clock() - NOON) / dt.timedelta(seconds=1)) as show:
        for done in range(5):
            show(done, 2_000, ", 7 events/s")
            clock.advance(PLAIN_INTERVAL_S / 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "verifying [/x]: 2 of 2,000 dates, 7 events/s, after 0:00:10, 2:46:30 left",
        "verifying [/x]: 4 of 2,000 dates, 7 events/s, after 0:00:20, 2:46:20 left",
    ]


def test_a_quick_command_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """A quick command writes nothing beside its result."""
    with progress_bar("verifying", "dates") as show:
        show(0, 1)
        show(1, 1)
    assert capsys.readouterr() == ("", "")
