"""The Prometheus of the alert drill."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.alert_drill.running import configuration
from tests.prometheus import run_tool

TARGETS = {"api": ["127.0.0.1:1"], "worker": ["127.0.0.1:2", "127.0.0.1:3"]}


def test_prometheus_accepts_the_configuration(tmp_path: Path) -> None:
    """A drill scrapes its own targets, and loads the rules of deploy/."""
    config = configuration(TARGETS, 5)
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert scraped == TARGETS
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    run_tool("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
