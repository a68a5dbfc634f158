"""The line of progress."""

from __future__ import annotations

import io

import msgspec
import pytest
from tripfold_client import Request
from tripfold_client.progress import showing

from tests.unit.tripfold_client import REQUEST

STATES = [
    msgspec.convert(REQUEST | {"status": status, "version": version}, Request)
    for version, status in enumerate(("completed with failures", "running", "completed"))
]


class Terminal(io.StringIO):
    """A terminal in memory."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, progress: bool = True) -> str:  # as its users give it
    """Return what is written of three states."""
    with showing(progress, stream) as show:
        for state in STATES:
            show(state)
    return stream.getvalue()


def test_a_terminal_has_one_line_that_changes() -> None:
    """A shorter state covers the longer one before it."""
    *_, last, end = shown(Terminal()).split("\r")[0:1] + shown(Terminal()).rpartition("\r")[2].splitlines() + [""]
    assert last.startswith("2024-05-01, completed, 0/0 cities")
    assert end == ""
    assert shown(Terminal()).count("\n") == 1


def test_a_log_has_a_line_at_times_and_for_the_end() -> None:
    """States that follow each other quickly are left out, but not the end."""
    assert shown(io.StringIO()).splitlines() == [
        "2024-05-01, completed with failures, 0/0 cities",
        "2024-05-01, completed, 0/0 cities",
    ]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_is_shown_unless_wanted(stream: io.StringIO) -> None:
    """Without progress nothing is written."""
    assert shown(stream, progress=False) == ""
