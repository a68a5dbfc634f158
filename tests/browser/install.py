"""Installs Chromium for the tests of the page, where there is none: ``python -m tests.browser.install``.

Without one the tests are skipped, so this says in one line what failed, and ends well.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

from playwright.sync_api import Error, sync_playwright

from tests.browser.conftest import chromium

INSTALL_DEADLINE_S = 600


def commands() -> list[str]:
    """Return the commands to try: Debian's package for root on Debian, which brings its libraries; then a download."""
    download = f"{sys.executable} -m playwright install chromium"
    is_root = os.geteuid() == 0
    if is_root and shutil.which("apt-get") and platform.freedesktop_os_release()["ID"] == "debian":
        return ["apt-get update -q && apt-get install -qy --no-install-recommends chromium", download]
    return [f"{download} --with-deps" if is_root and shutil.which("apt-get") else download]


def why_not() -> str | None:
    """Return why the tests cannot use a browser, or None if they can."""
    executable = chromium()
    if executable is None:
        return "there is none"
    try:
        with sync_playwright() as playwright:
            playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"]).close()
    except Error as error:
        return f"{executable} does not start: {last_line(error.message)}"
    return None


def last_line(text: str) -> str:
    """Return the last line of a program's output that is neither empty nor of a stack."""
    lines = (line.strip() for line in text.splitlines())
    return ([line for line in lines if line and not line.startswith("at ")] or ["no output"])[-1]


def main() -> None:
    """Install a browser unless one works."""
    reason = why_not()
    for command in commands() if reason else ():
        try:
            tried = subprocess.run(
                command,
                shell=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=INSTALL_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            reason = f"`{command}` took longer than {INSTALL_DEADLINE_S} s"
            continue
        reason = f"`{command}` failed: {last_line(tried.stdout)}" if tried.returncode else why_not()
        if reason is None:
            sys.stdout.write(f"installed Chromium for the tests of the page: {command}\n")
            break
    if reason:
        sys.stdout.write(
            f"no Chromium, so the tests of the page are skipped: {reason}; install one, or name one in "
            "TRIPFOLD_TEST_CHROMIUM\n"
        )


if __name__ == "__main__":
    main()
