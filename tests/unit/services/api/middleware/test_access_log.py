"""The access log and the metrics of HTTP requests."""

from __future__ import annotations

import pytest

from services.api.middleware import access_log
from tests.fakes.api import Client, Recorder, labels_of, metric


def test_access_log_has_one_line_per_request_without_the_query(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request but a successful probe makes one line with method, path, status and time, never the query."""
    recorder = Recorder()
    monkeypatch.setattr(access_log, "_log", recorder)
    for probed in ("/health/live", "/metrics"):
        assert client.get(probed).status_code == 200
    client.get("/country-stats?from=2024-05-01&to=2024-05-01&token=secret")
    client.get("/nothing?token=secret")
    assert [event for event, _ in recorder.entries] == ["http_request", "http_request"]
    fields = [fields for _, fields in recorder.entries]
    assert [(entry["method"], entry["path"], entry["status"]) for entry in fields] == [
        ("GET", "/country-stats", 400),
        ("GET", "/nothing", 404),
    ]
    assert all(entry["duration_ms"] >= 0 for entry in fields)
    assert "secret" not in str(recorder.entries)


def test_requests_are_counted_by_route(client: Client) -> None:
    """Requests are counted by route, not by path; requests that match no route share one label."""
    before = metric(client, "tripfold_http_request_seconds_count", method="other", route="unmatched", status="405")
    client.get("/process-requests/one")
    client.get("/process-requests/two")
    client.request("BREW", "/process-requests")
    after = metric(client, "tripfold_http_request_seconds_count", method="other", route="unmatched", status="405")
    assert after == before + 1
    routes = {labels["route"] for labels in labels_of(client, "tripfold_http_request_seconds_count")}
    assert "/process-requests/{request_id}" in routes
    assert "/process-requests/one" not in routes
