"""The application: errors, the documentation and the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from services.api.web import page as web
from tests.fakes.api import Client, World

PROBLEM = "application/problem+json"


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
    assert set(problem) == {"type", "title", "status", "detail", "http_request_id"}
    assert problem["http_request_id"] == response.headers["x-request-id"]
    assert ("allow" in response.headers) == (status == 405)


def test_unexpected_error_is_500_with_the_id_of_its_log_entry() -> None:
    """The response to an unexpected error has only an id, under which the log has the error."""
    world = World()
    world.store.objects = None  # type: ignore[assignment]  # to be broken in a way that nobody foresaw
    with world.client() as client, capture_logs(processors=[merge_contextvars]) as logged:
        response = client.get("/process-requests")
        given = client.get("/process-requests", headers={"X-Request-ID": "abc-1"})
        forged = client.get("/process-requests", headers={"X-Request-ID": "a b"})
    assert (response.status_code, response.headers["content-type"]) == (500, PROBLEM)
    assert given.headers["x-request-id"] == "abc-1"
    assert forged.headers["x-request-id"] != "a b"
    assert response.headers["x-request-id"] in response.json()["detail"]
    assert "NoneType" not in response.text
    crashed, access, *_ = logged
    assert (crashed["event"], access["event"]) == ("request_crashed", "http_request")
    assert crashed["http_request_id"] == access["http_request_id"] == response.headers["x-request-id"]
    assert isinstance(crashed["exc_info"], TypeError)


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
    files = Path(web.__file__).parent / "files"
    for path in (path for path in files.rglob("*") if path.is_file()):
        name = path.relative_to(files).as_posix()
        assert client.get(f"/page/{name}").content == path.read_bytes(), name
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search("https?://", text), name


def test_unchanged_parts_of_the_page_are_304(client: Client) -> None:
    """A browser that has a part of the page gets 304 while the part is unchanged."""
    etag = client.get("/page/main.js").headers["etag"]
    response = client.get("/page/main.js", headers={"If-None-Match": etag})
    assert (response.status_code, response.content) == (304, b"")
    assert client.get("/page/nothing.js").status_code == 404
