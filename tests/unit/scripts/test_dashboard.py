"""The dashboard of Grafana."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from scripts import check_docs, dashboard
from tests.prometheus import run_tool


def test_the_dashboard_is_up_to_date() -> None:
    """The file is what ``make monitoring`` writes."""
    assert dashboard.DASHBOARD.read_text() == dashboard.dashboard()


def test_each_query_is_valid(tmp_path: Path) -> None:
    """Prometheus accepts each query, with a value for Grafana's variable, and Tripfold exports each metric in it."""
    exported = check_docs.metrics()
    rules = []
    for panel in json.loads(dashboard.dashboard())["panels"]:
        (target,) = panel["targets"]
        rules.append({"record": "panel", "expr": target["expr"].replace("$__rate_interval", "5m")})
        named = set(re.findall(r"\btripfold_\w+", target["expr"]))
        assert {re.sub("_(count|bucket|sum)$", "", name) for name in named} <= exported
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run_tool("promtool", "check", "rules", str(tmp_path / "rules.yml"))
