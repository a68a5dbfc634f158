"""What a web page of another site may let a browser send to the API."""

from __future__ import annotations

import pytest

from services.api.auth import digest_of, mint_key
from shared.domain.topics import Topic
from tests.fakes.api import World

PROCESS = "/process-request?date=2024-05-01"
RANGE = "/country-stats?from=2024-05-01&to=2024-05-01"
EVIL = "https://evil.example"
KEY = mint_key()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://other.localhost", "Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", PROCESS),
        ("POST", "/backfills?from=2024-05-01&to=2024-05-02"),
        ("PUT", "/schedules/nightly?cron=0 6 * * *"),
        ("DELETE", "/schedules/nightly"),
    ],
)
def test_write_of_a_foreign_page_is_403(method: str, path: str, headers: dict[str, str]) -> None:
    """A page of another site or origin changes nothing, and can read as little as before."""
    world = World()
    with world.client() as client:
        refused = client.request(method, path, headers=headers)
        assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
        assert "TRIPFOLD_API_CORS_ORIGINS" in refused.json()["detail"]
        assert client.get(RANGE, headers=headers).status_code == 200
    assert world.published(Topic.PROCESS_REQUESTS) == []
    assert [key for key in world.store.objects if key.startswith(("requests/", "schedules/", "backfills/"))] == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://behind-a-proxy.example", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://dashboard.example.com"},
        {"Origin": "https://dashboard.example.com", "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_programs_and_own_and_named_pages_write(headers: dict[str, str]) -> None:
    """A program, the page of the API, and pages of the origins in the settings may write."""
    with World().client(api_cors_origins="https://dashboard.example.com") as client:
        assert client.post(PROCESS, headers=headers).status_code == 202


def test_a_key_does_not_allow_a_foreign_page_to_write() -> None:
    """A proxy may add the key to each request, so a key alone does not say that a user wanted a write."""
    with World().client(api_access="keys", api_keys=f"all:read+process:{digest_of(KEY)}") as client:
        assert client.post(PROCESS, headers={"X-API-Key": KEY, "Origin": EVIL}).status_code == 403
        assert client.post(PROCESS, headers={"X-API-Key": KEY}).status_code == 202


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "a@127.0.0.1", "[evil]"],
)
def test_unknown_host_of_an_open_api_is_421(host: str) -> None:
    """A name that resolves to the API without being its own gets neither data nor work done."""
    world = World()
    page = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    with world.client() as client:
        for response in (client.get(RANGE, headers={"Host": host}), client.post(PROCESS, headers=page)):
            assert (response.status_code, response.headers["content-type"]) == (421, "application/problem+json")
            assert "TRIPFOLD_API_HOSTS" in response.json()["detail"]
        assert client.get("/health/live", headers={"Host": host}).status_code == 200
    assert world.published(Topic.PROCESS_REQUESTS) == []


@pytest.mark.parametrize(
    "host",
    ["localhost:8080", "LOCALHOST", "127.0.0.1:8080", "10.0.0.5", "[::1]:8080", "[2001:db8::1]", "api:8080", "box"],
)
def test_local_and_named_hosts_of_an_open_api_are_known(host: str) -> None:
    """An address needs no DNS; names are localhost, the listen address and those of the settings."""
    with World().client(api_hosts="trips.example.com, API", api_host="box") as client:
        own = {"Host": host, "Origin": f"http://{host.lower()}"}
        assert client.post(PROCESS, headers=own).status_code == 202


def test_an_api_with_keys_has_any_host() -> None:
    """A page that lets its name resolve to the API has no key."""
    with World().client(api_access="keys", api_keys=f"all:read+process:{digest_of(KEY)}") as client:
        headers = {"X-API-Key": KEY, "Host": "trips.example.com"}
        assert client.post(PROCESS, headers=headers).status_code == 202
