"""The result of an alert drill."""

from __future__ import annotations

from scripts.alerts import ALERTS
from tests.alert_drill.__main__ import Outcome, looks_back, table


def test_the_table_shows_each_drill() -> None:
    """A row has the fault, its alert, the times, the other alerts and the result."""
    outcomes = (
        Outcome(fault="worker stopped", alert="TripfoldNotReady", fired_after_s=69.3, others={"TripfoldOther"}),
        Outcome(fault="none", alert=None, error="an alert fired without reason"),
    )
    assert table(outcomes).splitlines()[2:] == [
        "| worker stopped | TripfoldNotReady | 69 s | – | TripfoldOther | ok |",
        "| none | none | – | – | – | an alert fired without reason |",
    ]


def test_alerts_on_an_increase_look_back() -> None:
    """The drill does not wait for the end of an alert that looks back at the last hour."""
    look_back = {alert.name for alert in ALERTS if looks_back(alert.name)}
    assert {"TripfoldDeadLetters", "TripfoldApiErrorsFast"} <= look_back
    assert not {"TripfoldNotReady", "TripfoldUpstreamUnreachable"} & look_back
