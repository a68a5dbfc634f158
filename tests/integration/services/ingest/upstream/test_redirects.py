"""Redirects: their allowed targets, and the headers sent there."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tests.integration.services.ingest.upstream.client import (
    BODY,
    GOOD,
    client_of,
    redirect,
)
from tests.integration.services.ingest.upstream.hostile import (
    HostileServer,
)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_on_the_same_host_are_followed(status: int) -> None:
    """The client follows redirects to the file; the file keeps the URL of the request."""
    answers = [redirect("/elsewhere?x=1", status), redirect("deeper", status), GOOD]
    async with HostileServer(*answers) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)
        assert [request.target for request in server.requests][1:] == ["/elsewhere?x=1", "/deeper"]


async def test_escapes_of_a_url_are_sent_unchanged() -> None:
    """The escapes of a URL stay as they are: a signed one is valid in no other spelling."""
    signed = "/a%2Fb/%41?signature=%2F%3D%2B%20%7e+a"
    async with HostileServer(redirect(signed), GOOD) as server, client_of(server.url) as client:
        await client.fetch_exactly(BODY)
        assert server.requests[1].target == signed
        assert not any(name.startswith("x-") for request in server.requests for name in request.headers)


async def test_a_redirect_loop_fails_the_city() -> None:
    """Redirects are followed up to a bound."""
    async with HostileServer(redirect("/cities/1/stats?date=2024-05-01")) as server, client_of(server.url) as client:
        assert "more than 5 times" in await client.failure()
        assert len(server.requests) == 6


@pytest.mark.parametrize("location", ["http://localhost:{port}/x", "http://127.0.0.1:1/", "//localhost:{port}/"])
async def test_a_redirect_to_another_host_is_refused(location: str) -> None:
    """No request goes to a host or port that the settings do not name."""
    async with (
        HostileServer(GOOD) as other,
        HostileServer(redirect(location.format(port=other.port))) as server,
        client_of(server.url) as client,
    ):
        assert "TRIPFOLD_UPSTREAM_REDIRECT_HOSTS" in await client.failure()
        assert not other.requests


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "http://[",
        "http://a:b:c/",
        "\x01",
        "http://xn--a/",
        "http://xn--zzzzzz/x",
        "http://named.example:0/",
        "//127.0.0.1:0/x",
    ],
)
async def test_a_redirect_to_no_url_of_http_is_refused(location: str) -> None:
    """Another scheme, an invalid URL or international name, or port 0 fails the city at once. The error names it."""
    async with (
        HostileServer(redirect(location)) as server,
        client_of(server.url, redirect_hosts="named.example,xn--a") as client,
    ):
        assert repr(location) in await client.failure()
        assert len(server.requests) == 1


@pytest.mark.parametrize("named", ["localhost", "example.com,localhost:{port}"])
async def test_a_redirect_to_a_named_host_is_followed(named: str) -> None:
    """The setting names hosts, or hosts with a port."""
    async with (
        HostileServer(GOOD) as other,
        HostileServer(redirect(f"http://localhost:{other.port}/x")) as server,
        client_of(server.url, redirect_hosts=named.format(port=other.port)) as client,
    ):
        await client.fetch_exactly(BODY)


async def test_credentials_are_sent_to_the_upstream_only(tmp_path: Path) -> None:
    """Each request to the upstream carries name and password (RFC 7617); a host that it redirects to gets neither."""
    password = tmp_path / "password"
    password.write_text("open:sesame\n")
    async with (
        HostileServer(GOOD) as other,
        HostileServer(redirect("/moved"), redirect(f"http://localhost:{other.port}/x")) as server,
        client_of(server.url, redirect_hosts="localhost", username="worker", password_file=str(password)) as client,
    ):
        await client.fetch_exactly(BODY)
        login = f"Basic {base64.b64encode(b'worker:open:sesame').decode()}"
        assert [request.headers["authorization"] for request in server.requests] == [login, login]
        assert all("authorization" not in request.headers for request in other.requests)
