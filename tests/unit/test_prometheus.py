"""Fetching Prometheus and Alertmanager for the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import prometheus


@pytest.fixture(name="nowhere", autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(prometheus, "UNPACKED", tmp_path)
    return tmp_path / "usr" / "bin"


def test_a_failed_fetch_prints_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the tools, and without a way to fetch them, one line names the failed command and the reason."""
    monkeypatch.setattr(prometheus, "COMMAND", "echo trying; echo no network; exit 7")
    prometheus.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no Prometheus, so the tests of the alerts are skipped: `echo trying;")
    assert line.endswith("failed: no network")


def test_missing_tools_are_fetched_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nowhere: Path
) -> None:
    """Without the tools the command fetches them; with them, nothing happens."""
    monkeypatch.setattr(prometheus, "COMMAND", f"mkdir -p {nowhere} && touch {nowhere}/promtool {nowhere}/amtool")
    prometheus.main()
    prometheus.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("fetched Prometheus")
    assert prometheus.find("promtool") == str(nowhere / "promtool")
