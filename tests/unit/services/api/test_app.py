"""The application: errors, health, access log, metrics and documentation."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from openapi_spec_validator import validate
from prometheus_client.parser import text_string_to_metric_families

from services.api import health
from services.api.health import Readiness
from services.api.http import problems
from services.api.middleware import access_log
from services.api.web.page import page_files
from shared.kafka.producer import KafkaPublisher, KafkaUnavailable
from shared.runtime.health import Health
from shared.runtime.settings import Settings
from shared.storage.object_store import StoreUnavailable
from tests.fakes.api import NOW, Client, World, record_of, stats, write

PROBLEM = "application/problem+json"
UNUSED_PORT = 1  # nobody listens there


@pytest.fixture(name="document")
def _document(client: Client) -> dict[str, Any]:
    response = client.get("/schema/openapi.json")
    assert response.status_code == 200
    document: dict[str, Any] = response.json()
    return document


class Recorder:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        """Keep an entry."""
        self.entries.append((event, fields))

    error = info

    def debug(self, event: str, **fields: Any) -> None:
        """Keep nothing: the level info hides it."""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/schema", 404),
        ("GET", "/schema/redoc", 404),
        ("GET", "/docs/nothing.js", 404),
        ("GET", "/docs/..%2f..%2fcore.py", 404),
        ("GET", "/process-request", 405),
        ("DELETE", "/country-stats", 405),
        ("POST", "/docs", 405),
    ],
)
def test_unknown_paths_and_methods_are_problems(client: Client, method: str, path: str, status: int) -> None:
    """An unknown path or method gets a problem, like every other error."""
    response = client.request(method, path)
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM)
    problem = response.json()
    assert problem["status"] == status
    assert set(problem) == {"type", "title", "status", "detail"}
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/health/live", "/metrics", "/process-requests", "/country-stats?from=2024-05-01&to2024-05-02"],
)
def test_head_has_the_headers_of_get(client: Client, path: str) -> None:
    """The response to HEAD has the headers of GET and no body."""
    headers = {"X-Request-ID": "the-same"}
    head, get = client.head(path, headers=headers), client.get(path, headers=headers)
    assert (head.status_code, head.content) == (200, b"")
    assert {**head.headers, "content-length": ""} == {**get.headers, "content-length": ""}


def test_head_of_an_event_stream_ends_at_once() -> None:
    """HEAD on an event stream gets its headers at once."""
    world = World()
    record = record_of(NOW)
    write(world, record)
    with world.client() as client:
        response = client.head(f"/process-requests/{record.request_id}/events")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"].startswith("text/event-stream")


def test_allow_lists_the_methods_of_a_path(client: Client) -> None:
    """Allow lists HEAD wherever it lists GET, and OPTIONS ignores the query."""
    assert client.put("/country-stats").headers["allow"] == "GET, HEAD, OPTIONS"
    refused = client.head("/process-request")
    assert (refused.status_code, refused.headers["allow"]) == (405, "OPTIONS, POST")
    options = client.options("/country-stats?from=2024-05-01&to=2024-05-02")
    assert (options.status_code, options.content) == (204, b"")
    assert options.headers["allow"] == "GET, HEAD, OPTIONS"
    path = "/process-requests/018f3d2a-5c00-7aaa-8bbb-0123456789ab"
    assert client.options(path).headers["allow"] == client.put(path).headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert client.options("/nothing").status_code == 404


def test_unexpected_error_is_500_with_the_id_of_its_log_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The response to an unexpected error has only an id, under which the log has the error."""
    recorder = Recorder()
    monkeypatch.setattr(problems, "_log", recorder)
    world = World()
    world.store.objects = None  # type: ignore[assignment]  # to be broken in a way that nobody foresaw
    with world.client() as client:
        response = client.get("/process-requests")
        given = client.get("/process-requests", headers={"X-Request-ID": "abc-1"})
        forged = client.get("/process-requests", headers={"X-Request-ID": "a b"})
    assert (response.status_code, response.headers["content-type"]) == (500, PROBLEM)
    assert given.headers["x-request-id"] == "abc-1"
    assert forged.headers["x-request-id"] != "a b"
    assert response.headers["x-request-id"] in response.json()["detail"]
    assert "NoneType" not in response.text
    event, fields = recorder.entries[0]
    assert (event, fields["http_request_id"]) == ("request_crashed", response.headers["x-request-id"])
    assert isinstance(fields["exc_info"], TypeError)


def test_examples_of_problems_have_the_status_of_their_response(client: Client) -> None:
    """Each example of a problem in the OpenAPI document has the status of its response."""
    paths = client.get("/schema/openapi.json").json()["paths"]
    told = {
        (status, example["value"]["status"])
        for operations in paths.values()
        for operation in operations.values()
        for status, response in operation["responses"].items()
        for example in response.get("content", {}).get(PROBLEM, {}).get("examples", {}).values()
    }
    assert len(told) > 8
    assert all(int(status) == of_example for status, of_example in told)


def test_liveness_does_not_depend_on_s3_and_kafka(client: Client) -> None:
    """The liveness check does not depend on S3 and Kafka."""
    assert client.get("/health/live").json() == {"live": True}


async def _reachable() -> None:
    return


async def _unreachable() -> None:
    raise KafkaUnavailable("no broker answers")


def test_api_is_ready_when_it_reaches_its_dependencies() -> None:
    """An API that can reach everything is ready."""
    with World().client(checks={"s3": _reachable, "kafka": _reachable}) as client:
        response = client.get("/health/ready")
    assert (response.status_code, response.json()) == (200, {"ready": True, "faults": {}})


def test_api_without_kafka_is_not_ready_and_still_serves_reads() -> None:
    """An API that cannot reach Kafka is not ready, says why, and still serves what can be read."""
    world = World()
    world.fold_in(stats("armenia"))
    with world.client(checks={"s3": _reachable, "kafka": _unreachable}) as client:
        response = client.get("/health/ready")
        assert (response.status_code, response.json()) == (
            503,
            {"ready": False, "faults": {"kafka": "no broker answers"}},
        )
        assert client.get("/country-stats?from=2024-05-01&to=2024-05-01").status_code == 200
        assert metric(client, "tripfold_ready") == 0.0


async def test_concurrent_readiness_checks_share_one_probe() -> None:
    """Concurrent readiness checks share one probe, which is valid for a second."""
    probes = 0
    now_s = 100.0

    async def counting() -> None:
        nonlocal probes
        probes += 1
        await asyncio.sleep(0)

    readiness = Readiness(Health(), {"s3": counting}, clock=lambda: now_s)
    await asyncio.gather(*(readiness.report() for _ in range(10)))
    assert probes == 1
    now_s += health.PROBE_AGE_MAX_S
    await readiness.report()
    assert probes == 2


async def test_readiness_recovers_when_the_fault_ends() -> None:
    """A fault is reported only while it lasts."""
    now_s = 100.0
    faults = [StoreUnavailable("S3 is down"), ValueError("odd"), None]
    state = Health()
    state.started = True

    async def check() -> None:
        fault = faults.pop(0)
        if fault is not None:
            raise fault

    readiness = Readiness(state, {"s3": check}, clock=lambda: now_s)
    reports = []
    for _ in range(3):
        reports.append(await readiness.report())
        now_s += health.PROBE_AGE_MAX_S
    assert [report.faults for report in reports] == [{"s3": "S3 is down"}, {"s3": "odd"}, {}]
    assert [report.ready for report in reports] == [False, False, True]


async def test_dependency_that_does_not_respond_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dependency that does not respond in time is reported as unavailable."""
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.01)

    async def silent() -> None:
        await asyncio.Event().wait()

    report = await Readiness(Health(), {"s3": silent, "kafka": _reachable}).report()
    assert list(report.faults) == ["s3"]


async def test_kafka_check_fails_without_a_broker() -> None:
    """The check of Kafka fails when no broker listens."""
    settings = Settings.model_validate({"kafka_bootstrap_servers": f"127.0.0.1:{UNUSED_PORT}"})
    with pytest.raises(KafkaUnavailable, match=f"127.0.0.1:{UNUSED_PORT}"):
        await KafkaPublisher(settings, source="test").check()


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


def labels_of(client: Client, name: str) -> list[dict[str, str]]:
    """Return the labels of every sample of a metric."""
    assert client.get("/metrics").headers["content-type"].count("charset") == 1
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [sample.labels for family in families for sample in family.samples if sample.name == name]


def metric(client: Client, name: str, **labels: str) -> float:
    """Return the value of a metric's sample, or 0 if there is none."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if sample.labels == labels)


def test_document_is_valid_openapi(document: dict[str, Any]) -> None:
    """The document is valid OpenAPI 3.1."""
    assert document["openapi"].startswith("3.1.")
    validate(document)


def test_every_operation_is_documented(document: dict[str, Any]) -> None:
    """Every operation is documented, with a summary and a description."""
    operations = {
        (method, path): operation for path, item in document["paths"].items() for method, operation in item.items()
    }
    assert set(operations) == {
        ("post", "/process-request"),
        ("get", "/process-requests"),
        ("get", "/process-requests/{request_id}"),
        ("delete", "/process-requests/{request_id}"),
        ("get", "/process-requests/{request_id}/events"),
        ("post", "/process-requests/{request_id}/retry"),
        ("get", "/process-ranges/{range_id}"),
        ("get", "/quarantine"),
        ("delete", "/process-ranges/{range_id}"),
        ("get", "/country-stats"),
        ("get", "/country-stats/{country}/{date}"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
    }
    assert all(operation["summary"] and operation["description"] for operation in operations.values())


def test_parameters_are_documented_as_the_operation_accepts_them(document: dict[str, Any]) -> None:
    """Parameters are documented as the operation accepts them: ``from`` and ``to`` are required dates."""
    parameters = {
        parameter["name"]: parameter for parameter in document["paths"]["/country-stats"]["get"]["parameters"]
    }
    assert set(parameters) == {"from", "to", "country", "detail"}
    assert [name for name, parameter in parameters.items() if parameter["required"]] == ["from", "to"]
    assert parameters["to"]["schema"]["format"] == "date"
    assert all(parameter["description"] and parameter["examples"] for parameter in parameters.values())


def test_every_error_is_documented_as_a_problem(document: dict[str, Any]) -> None:
    """Every error of an operation is documented as a problem."""
    for path, item in document["paths"].items():
        for operation in item.values():
            errors = {status: response for status, response in operation["responses"].items() if status >= "400"}
            assert {"413", "414", "431"} <= set(errors)
            if path.startswith("/health"):
                continue
            assert {"400", "401", "403", "429", "503"} <= set(errors)
            assert all(set(response["content"]) == {PROBLEM} for response in errors.values()), path


def test_the_figures_of_a_day_are_documented_as_required(document: dict[str, Any]) -> None:
    """The four figures of a day are required; the details are documented, and optional."""
    day = document["components"]["schemas"]["DayStats"]
    assert set(day["required"]) == {"bus_count", "passenger_count", "exist_accident", "average_delay_s"}
    assert {"complete", "cities_reported", "cities_expected", "version"} <= set(day["properties"])
    content = document["paths"]["/country-stats"]["get"]["responses"]["200"]["content"]["application/json"]
    assert [set(example["value"]) for example in content["examples"].values()] == [{"armenia"}, {"armenia"}]


def test_the_documentation_loads_nothing_from_other_hosts(client: Client) -> None:
    """The page of the documentation loads all its parts from this service."""
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/start.js"} <= set(loaded)
    assert all(address.startswith(("/", "data:")) for address in loaded)
    for address in loaded:
        if address.startswith("/"):
            assert client.get(address).status_code == 200, address
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert '"/schema/openapi.json"' in client.get("/docs/start.js").text


def test_the_page_loads_nothing_from_other_hosts(client: Client) -> None:
    """The page at the root loads all its parts from this service, without inline scripts or styles."""
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"/page/main.js", "/page/style.css", "/docs"} <= set(addresses)
    assert all(client.get(address).status_code == 200 for address in addresses if address.startswith("/"))
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert not re.search(r"<style|<script(?! type=\"module\" src=)| style=| on[a-z]+=", page.text)
    for name, file in page_files().items():
        assert client.get(f"/page/{name}").content == file.body
        text = file.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search("https?://", text), name


def test_unchanged_parts_of_the_page_are_304(client: Client) -> None:
    """A browser that has a part of the page gets 304 while the part is unchanged."""
    etag = client.get("/page/main.js").headers["etag"]
    response = client.get("/page/main.js", headers={"If-None-Match": etag})
    assert (response.status_code, response.content) == (304, b"")
    assert client.get("/page/nothing.js").status_code == 404
