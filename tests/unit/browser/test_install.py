"""Installing a browser for the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import conftest, install


def test_a_failed_browser_installation_prints_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If no browser works and none can be installed, one line names the failed command and the reason."""
    monkeypatch.setattr(install, "chromium", lambda: None)
    monkeypatch.setattr(install, "commands", lambda: ["echo no network; exit 7"])
    install.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert "the tests of the page are skipped: `echo no network; exit 7` failed: no network" in line


def test_a_missing_browser_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a browser the command installs one, tries nothing else, and the output names the command."""
    real, installed = conftest.chromium(), tmp_path / "chromium"
    if real is None:
        pytest.fail("no Chromium: run `python -m tests.browser.install`")
    monkeypatch.setattr(install, "chromium", lambda: str(installed) if installed.exists() else None)
    monkeypatch.setattr(install, "commands", lambda: [f"ln -s {real} {installed}", "echo tried; exit 7"])
    install.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("installed Chromium for the tests of the page: ln -s")
