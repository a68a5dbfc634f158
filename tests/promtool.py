"""Fetches promtool, with which the tests of the alerts run: ``python -m tests.promtool``.

It comes with Prometheus. Debian's package is unpacked beside the environment of the tests and not installed, so that no
Prometheus starts. Without promtool those tests are skipped, so this says in one line what failed, and ends well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNPACKED = Path(sys.prefix) / "prometheus"
COMMAND = (
    f"mkdir -p {UNPACKED} && cd {UNPACKED} && (apt-get download -q prometheus || "
    "(apt-get update -q && apt-get download -q prometheus)) && dpkg -x prometheus_*.deb . && rm prometheus_*.deb"
)
DEADLINE_S = 300


def promtool() -> str | None:
    """Return where promtool is: on the path, or where this module unpacks it."""
    unpacked = UNPACKED / "usr" / "bin" / "promtool"
    return shutil.which("promtool") or (str(unpacked) if unpacked.exists() else None)


def run_promtool(*arguments: str, text: str = "") -> None:
    """Run promtool on ``text``, and fail with its output if it fails. Skip the test without promtool."""
    executable = promtool()
    if executable is None:
        # A run that decides about a change leaves nothing out.
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("no promtool: run `python -m tests.promtool`, or install Prometheus")
    ended = subprocess.run([executable, *arguments], input=text, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def main() -> None:
    """Fetch promtool unless there is one."""
    if promtool():
        return
    try:
        tried = subprocess.run(
            COMMAND,
            shell=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        reason = (tried.stdout.strip().splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"it took longer than {DEADLINE_S} s"
    sys.stdout.write(
        f"fetched promtool for the tests of the alerts into {UNPACKED}\n"
        if promtool()
        else f"no promtool, so the tests of the alerts are skipped: `{COMMAND}` failed: {reason}\n"
    )


if __name__ == "__main__":
    main()
