"""HEAD and OPTIONS."""

from __future__ import annotations

import pytest

from tests.fakes.api import NOW, Client, World, record_of, write


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
