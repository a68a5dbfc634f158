"""Fetching promtool for the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import promtool


@pytest.fixture(name="nowhere", autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(promtool, "UNPACKED", tmp_path)
    return tmp_path / "usr" / "bin" / "promtool"


def test_a_failed_fetch_prints_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without promtool, and without a way to fetch it, one line names the failed command and the reason."""
    monkeypatch.setattr(promtool, "COMMAND", "echo trying; echo no network; exit 7")
    promtool.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no promtool, so the tests of the alerts are skipped: `echo trying;")
    assert line.endswith("failed: no network")


def test_a_missing_promtool_is_fetched_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nowhere: Path
) -> None:
    """Without promtool the command fetches it; with one, nothing happens."""
    monkeypatch.setattr(promtool, "COMMAND", f"mkdir -p {nowhere.parent} && touch {nowhere}")
    promtool.main()
    promtool.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("fetched promtool")
    assert promtool.promtool() == str(nowhere)
