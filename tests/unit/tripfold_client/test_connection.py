"""Calls of the client over a server that fails."""

from __future__ import annotations

import asyncio
import socket
import ssl

import httpx
import pytest
import trustme
from tripfold_client import (
    ApiError,
    AsyncTripfold,
    Conflict,
    ConnectionFailed,
    InvalidCall,
    InvalidParameter,
    InvalidUrl,
    NotAuthorized,
    NotFound,
    Tripfold,
    Unavailable,
    UnexpectedResponse,
)
from tripfold_client.connection import BACKOFF_MAX_S, Connection
from tripfold_client.transport import BlockingTransport, run

from tests.fakes.scripted_server import HANG_UP, SILENCE, response, scripted_server
from tests.unit.tripfold_client import REQUEST

PROBLEM = {"type": "urn:problem-type:tripfold:x", "title": "X", "detail": "It is so.", "http_request_id": "abc-1"}


class Sleepless(BlockingTransport):
    """Notes how long it should sleep."""

    def __init__(self) -> None:
        super().__init__(httpx.Client(verify=False))  # no TLS
        self.slept_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)


def problem(status: int, **headers: str) -> bytes:
    """Return a response with problem details."""
    return response(status, PROBLEM | {"status": status}, **headers)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_api_is_asked_again_when_it_says(status: int) -> None:
    """The client waits as long as Retry-After says, at most a minute, and otherwise longer each time."""
    busy = problem(status, Retry_After="7"), problem(status, Retry_After="9999"), problem(status), problem(status)
    transport = Sleepless()
    with scripted_server(*busy, response(200, [])) as (url, _):
        assert run(Connection(transport, url, None).call("GET", "/")) == b"[]"
    assert transport.slept_s[:2] == [7, 60]
    assert 1 <= transport.slept_s[2] < transport.slept_s[3] * 2 <= 2 * BACKOFF_MAX_S


def test_an_error_that_stays_has_the_problem_details() -> None:
    """After the last retry the error has every field of the problem details."""
    with scripted_server(*[problem(503)] * 3) as (url, seen):
        with pytest.raises(Unavailable, match=r"^It is so\.$") as raised:
            run(Connection(Sleepless(), url, None, retries=2).call("GET", "/"))
        assert len(seen) == 3
    error = raised.value
    assert (error.type, error.title, error.status) == ("urn:problem-type:tripfold:x", "X", 503)
    assert (error.detail, error.http_request_id, error.request_id) == ("It is so.", "abc-1", None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidCall),
        (401, NotAuthorized),
        (403, NotAuthorized),
        (404, NotFound),
        (409, Conflict),
        (422, InvalidCall),
        (500, ApiError),
    ],
)
def test_a_refusal_is_an_error_of_its_kind_and_is_not_repeated(status: int, kind: type[ApiError]) -> None:
    """Each status has its error. The call is made once."""
    body = PROBLEM | {"status": status, "invalid_parameters": [{"name": "from", "reason": "it is late"}]}
    with scripted_server(response(status, body)) as (url, seen):
        with Tripfold(url) as api, pytest.raises(ApiError) as raised:
            api.stats("2024-05-01", "2024-05-02")
        assert len(seen) == 1
    assert type(raised.value) is kind
    assert raised.value.invalid_parameters == (InvalidParameter("from", "it is late"),)


def test_a_lost_response_is_asked_for_again_under_the_same_key() -> None:
    """Every attempt of a call has the same idempotency key, so the API makes one request; another call has its own."""
    with scripted_server(HANG_UP, problem(502), response(202, REQUEST), response(202, REQUEST)) as (url, seen):
        api = AsyncTripfold(url, "sesame", transport=Sleepless())
        assert run(api.process("2024-05-01")).status == "accepted"
        run(api.process("2024-05-01"))
        keys = [line for head in seen for line in head.splitlines() if line.lower().startswith("idempotency-key")]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert "X-API-Key: sesame" in seen[0]


def test_a_silent_server_is_given_up() -> None:
    """A server that sends nothing for the timeout is an error that says so."""
    with (
        scripted_server(SILENCE, SILENCE) as (url, seen),
        pytest.raises(ConnectionFailed, match="cannot be reached: timed out"),
    ):
        run(Connection(Sleepless(), url, None, timeout_s=0.05, retries=1).call("GET", "/"))
    assert len(seen) == 2


def test_a_refused_connection_is_repeated_only_once_the_api_was_reached() -> None:
    """A URL where nothing listens is an error at once. Later it is a restart, and is waited for."""
    transport = Sleepless()
    with scripted_server(response(200, [])) as (url, _):
        connection = Connection(transport, url, None, retries=3)
        run(connection.call("GET", "/"))
    with pytest.raises(ConnectionFailed):
        run(Connection(Sleepless(), url, None).call("GET", "/"))
    assert transport.slept_s == []
    with pytest.raises(ConnectionFailed, match="Check the URL, and that the API runs"):
        run(connection.call("GET", "/"))
    assert len(transport.slept_s) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (response(404, b"<html>"), "status 404"),
        (response(200, b"<html>"), "not in its format"),
        (response(200, {"requests": 7}), "not in its format"),
        (response(308, b"", Location="https://x.example.com/"), "status 308, which leads to https://x.example.com/"),
    ],
)
def test_another_server_is_recognised(answer: bytes, reason: str) -> None:
    """A response that is not Tripfold's is an error that names the URL."""
    named = "is not the API of Tripfold: .*"
    with scripted_server(answer) as (url, _), pytest.raises(UnexpectedResponse, match=f"{url} {named}{reason}"):
        list(Tripfold(url).requests())


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x", "http://", "http://x:port", "x"])
def test_a_text_that_is_no_http_url_is_refused(url: str) -> None:
    """The error names the value, before anything is called."""
    with pytest.raises(InvalidUrl, match="the URL is "):
        Tripfold(url)


def test_url_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without arguments, the variables of the commands count. A proxy is not used for this machine."""
    with (
        socket.create_server(("127.0.0.1", 0)) as nobody,
        scripted_server(response(200, {"schedules": []})) as (
            url,
            seen,
        ),
    ):
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("TRIPFOLD_API_URL", f"{url}/")
        monkeypatch.setenv("TRIPFOLD_API_KEY", "sesame")
        assert Tripfold().schedules() == ()
        assert "X-API-Key: sesame" in seen[0]


async def test_an_unknown_certificate_is_refused() -> None:
    """An https URL is read only from a server whose authority this machine knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with AsyncTripfold(url, retries=0, timeout=5) as api:
            with pytest.raises(ConnectionFailed, match="certificate verify failed"):
                await api.schedules()
