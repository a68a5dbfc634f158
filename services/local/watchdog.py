"""Ends the children of a supervisor that died without ending them: the last resort, run as a program of its own.

Standard input is a pipe from the supervisor. Each line is a JSON list of the process groups that run, in the order
in which they are to stop: ``[[31, 32], [21]]`` means 31 and 32 together, then 21. The end of the pipe means that
the supervisor is gone, however it died: the kernel closes it for a process killed with -9 too, on Linux and on
macOS. An orderly supervisor says ``[]`` before it closes the pipe, and there is nothing left to do.

Only the standard library is imported, so that it starts in milliseconds and stays small.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

GROUP_GRACE_S = 4.0
POLL_INTERVAL_S = 0.02


def main() -> None:
    """Follow the supervisor to its end, then stop what it left running."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    groups: list[list[int]] = []
    for line in sys.stdin:
        groups = json.loads(line)
    for process_groups in groups:
        _stop_together(process_groups)


def _stop_together(process_groups: list[int]) -> None:
    asked = [group for group in process_groups if _send(group, signal.SIGTERM)]
    deadline = time.monotonic() + GROUP_GRACE_S
    while any(_runs(group) for group in asked) and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)
    # The leader may have ended and left children of its own behind.
    for group in asked:
        _send(group, signal.SIGKILL)


def _runs(process_group: int) -> bool:
    """Say whether the leader of a group runs.

    A zombie does not. The orphans are collected by the first process of the system, which may take seconds, and in
    a container may never do it.
    """
    try:
        with open(f"/proc/{process_group}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123  # pathlib takes longer to import than all the rest
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        # Gone; or a system without /proc, where only a signal can tell.
        return not os.path.exists("/proc/self") and _send(process_group, 0)  # noqa: PTH110  # as above


def _send(process_group: int, number: int) -> bool:
    """Send a signal and say whether the group still has a process. Signal 0 only asks."""
    try:
        os.killpg(process_group, number)
    except (ProcessLookupError, PermissionError):
        # macOS answers PermissionError for a group in which only a zombie is left.
        return False
    return True


if __name__ == "__main__":
    main()
