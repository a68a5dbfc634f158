"""The access log and the metrics of HTTP requests."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from opentelemetry.trace import SpanKind

from services.api.auth import digest_of, mint_key
from services.api.middleware import access_log
from tests.fakes.api import Client, Recorder, World, labels_of, metric
from tests.fakes.traces import traced
from tests.serving import served

KEY = mint_key()
READER = f"reader:read:{digest_of(KEY)}"
FORWARDED = {"X-Forwarded-For": "192.0.2.1, 203.0.113.9"}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return the lines of the access log, as they come."""
    recorder = Recorder()
    monkeypatch.setattr(access_log, "_log", recorder)
    return recorder.entries


def test_access_log_has_one_line_per_request_without_secrets(
    client: Client, logged: list[tuple[str, dict[str, Any]]]
) -> None:
    """Each request but a successful probe makes one line with method, path, status, time and declared parameters."""
    for probed in ("/health/live", "/metrics"):
        assert client.get(probed).status_code == 200
    client.get("/country-stats?from=2024-05-01&to=2024-05-01&token=secret")
    client.get("/nothing?token=secret")
    assert [event for event, _ in logged] == ["http_request", "http_request"]
    fields = [fields for _, fields in logged]
    assert fields[0]["parameters"] == {"from": "2024-05-01", "to": "2024-05-01"}
    assert [(entry["method"], entry["path"], entry["status"]) for entry in fields] == [
        ("GET", "/country-stats", 400),
        ("GET", "/nothing", 404),
    ]
    assert all(entry["duration_ms"] >= 0 for entry in fields)
    assert "secret" not in str(logged)


def test_access_log_says_who_did_what_with_which_result(logged: list[tuple[str, dict[str, Any]]]) -> None:
    """A line names the key, the address, the operation, its parameters and the result, also of a refused request."""
    processor = mint_key()
    keys = f"{READER},nightly:process:{digest_of(processor)}"
    with World().client(api_access="keys", api_keys=keys) as client:
        request_id = client.post("/process-request?date=2024-05-01", headers={"X-API-Key": processor}).json()["id"]
        client.delete(f"/process-requests/{request_id}", headers={"X-API-Key": KEY})
        client.delete(f"/process-requests/{request_id}")
    audited = ("key", "client", "operation", "parameters", "status", "request_id")
    assert [tuple(fields.get(name) for name in audited) for _, fields in logged] == [
        ("nightly", "testclient", "processRequest", {"date": "2024-05-01"}, 202, request_id),
        ("reader", "testclient", "cancelProcessRequest", {"request_id": request_id}, 403, None),
        (None, "testclient", "cancelProcessRequest", {"request_id": request_id}, 401, None),
    ]


@pytest.mark.parametrize(
    ("settings", "client"),
    [
        ({}, "127.0.0.1"),
        ({"api_trusted_proxies": "10.0.0.0/8, 127.0.0.1"}, "203.0.113.9"),
        ({"api_trusted_proxies": "127.0.0.1,203.0.113.0/24"}, "192.0.2.1"),
    ],
)
def test_client_address_is_that_of_a_header_only_behind_a_trusted_proxy(
    logged: list[tuple[str, dict[str, Any]]], settings: dict[str, str], client: str
) -> None:
    """The address is the last one in X-Forwarded-For that no trusted proxy has; without trusted proxies, the peer's."""
    with served(World(), **settings) as address:
        httpx.get(f"{address}/process-requests", headers=FORWARDED)
    assert [fields["client"] for _, fields in logged] == [client]


def test_each_request_is_a_span_that_continues_the_trace_of_its_caller(client: Client) -> None:
    """The span has the name of the route; probes have none."""
    with traced() as exporter:
        client.get("/health/live")
        client.get(
            "/process-requests/one", headers={"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
        )
        (span,) = (span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER)
    assert span.name == "GET /process-requests/{request_id}"
    assert f"{span.context.trace_id:x}" == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert (span.attributes or {})["http.response.status_code"] == 404


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
