"""Fetches Prometheus and Alertmanager, with which the tests of the alerts run: ``python -m tests.prometheus``.

Debian's packages are unpacked beside the environment of the tests and not installed, so that no daemon starts. Without
them those tests are skipped, so this says in one line what failed, and ends well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

Tool = Literal["prometheus", "promtool", "alertmanager", "amtool"]
UNPACKED = Path(sys.prefix) / "prometheus"
# Debian prefixes the name of the daemon; amtool it leaves as it is.
_NAMES: dict[Tool, str] = {"alertmanager": "prometheus-alertmanager"}
_DOWNLOAD = "apt-get download -q prometheus prometheus-alertmanager"
COMMAND = (
    f"mkdir -p {UNPACKED} && cd {UNPACKED} && ({_DOWNLOAD} || (apt-get update -q && {_DOWNLOAD})) && "
    "for package in *.deb; do dpkg -x $package . && rm $package || exit 1; done"
)
DEADLINE_S = 300


def find(tool: Tool) -> str | None:
    """Return where a tool is: on the path, or where this module unpacks it."""
    unpacked = UNPACKED / "usr" / "bin" / _NAMES.get(tool, tool)
    return shutil.which(tool) or (str(unpacked) if unpacked.exists() else None)


def run_tool(tool: Tool, *arguments: str, text: str = "") -> None:
    """Run a tool on ``text``, and fail with its output if it fails. Skip the test without the tool."""
    executable = find(tool)
    if executable is None:
        # A run that decides about a change leaves nothing out.
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"no {tool}: run `python -m tests.prometheus`, or install Prometheus and Alertmanager")
    environment = {**os.environ, "GOGC": "400"}  # these programs are short: less collection, a little more memory
    ended = subprocess.run(
        [executable, *arguments], input=text, capture_output=True, text=True, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def main() -> None:
    """Fetch the tools unless they are there."""
    if complete():
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
        f"fetched Prometheus for the tests of the alerts into {UNPACKED}\n"
        if complete()
        else f"no Prometheus, so the tests of the alerts are skipped: `{COMMAND}` failed: {reason}\n"
    )


def complete() -> bool:
    """Return whether the tools are there."""
    return all(find(tool) for tool in ("promtool", "amtool"))


if __name__ == "__main__":
    main()
