"""API keys, scopes and rate limits."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from services.api.auth import InvalidAccessSettings, RateLimiter, Scope, access_of, digest_of, mint_key, parse_keys
from shared.domain.topics import Topic
from shared.runtime.settings import Settings
from tests.fakes.api import World

READER, NIGHTLY = mint_key(), mint_key()
KEYS = f"reader:read:{digest_of(READER)}, nightly:read+process:{digest_of(NIGHTLY)}"
ASK = "/process-request?date=2024-05-01"


@pytest.mark.parametrize(
    "headers", [{}, {"X-API-Key": "wrong"}, {"Authorization": f"Basic {READER}"}, {"Authorization": "Bearer"}]
)
def test_request_without_a_valid_key_is_401(headers: dict[str, str]) -> None:
    """Without a known key, nothing is read and nothing is published."""
    world = World()
    with world.client(api_access="keys", api_keys=KEYS) as client:
        for response in (client.get("/process-requests", headers=headers), client.post(ASK, headers=headers)):
            assert (response.status_code, response.headers["content-type"]) == (401, "application/problem+json")
            assert response.headers["www-authenticate"].startswith("Bearer")
    assert world.published(Topic.PROCESS_REQUESTS) == []
    assert world.store.reads == []


def test_key_is_limited_to_its_scopes() -> None:
    """A key is accepted in either header, and only for operations that its scopes allow."""
    world = World()
    with world.client(api_access="keys", api_keys=KEYS) as client:
        assert client.get("/process-requests", headers={"X-API-Key": READER}).status_code == 200
        assert client.get("/process-requests", headers={"Authorization": f"Bearer {READER}"}).status_code == 200
        refused = client.post(ASK, headers={"X-API-Key": READER})
        assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
        assert '"process" scope' in refused.json()["detail"]
        assert client.delete("/process-requests/1", headers={"X-API-Key": READER}).status_code == 403
        assert world.published(Topic.PROCESS_REQUESTS) == []
        assert client.post(ASK, headers={"X-API-Key": NIGHTLY}).status_code == 202


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/docs", "/schema/openapi.json", "/health/live", "/metrics"])
def test_page_documentation_and_health_need_no_key(path: str) -> None:
    """The page's files, the documentation, health and metrics are for everybody."""
    with World().client(api_access="keys", api_keys=KEYS) as client:
        assert client.get(path).status_code == 200


def test_keys_are_in_no_log_and_no_response(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a known key nor one that was tried shows in a log or a response, even during an outage."""
    world = World()
    tried = mint_key()
    with world.client(api_access="keys", api_keys=KEYS) as client:
        responses = [
            client.get(path, headers=headers)
            for path in ("/process-requests", "/nothing", "/metrics")
            for headers in ({"X-API-Key": READER}, {"Authorization": f"Bearer {tried}"})
        ]
        world.store.down = True
        responses.append(client.get("/process-requests", headers={"X-API-Key": READER}))
    logged = capsys.readouterr()
    assert "/process-requests" in logged.out
    told = logged.out + logged.err + "".join(response.text for response in responses)
    assert [key for key in (READER, tried, digest_of(READER)) if key in told] == []


def test_each_key_has_idempotency_keys_of_its_own() -> None:
    """The same idempotency key under two API keys makes two requests."""
    other = mint_key()
    with World().client(api_access="keys", api_keys=f"{KEYS},other:process:{digest_of(other)}") as client:
        statuses = [
            client.post(f"/process-request?date={date}", headers={"X-API-Key": key, "Idempotency-Key": "1"}).status_code
            for key, date in ((NIGHTLY, "2024-05-01"), (other, "2024-05-02"), (NIGHTLY, "2024-05-03"))
        ]
    assert statuses == [202, 202, 422]


def test_a_key_that_processes_reads_the_status_of_requests() -> None:
    """A key with the process scope reads requests and backfills; statistics and lists need the read scope."""
    process_only = mint_key()
    with World().client(api_access="keys", api_keys=f"nightly:process:{digest_of(process_only)}") as client:
        headers = {"X-API-Key": process_only}
        request = client.post(ASK, headers=headers).headers["location"]
        many = client.post("/backfills?from=2024-05-01&to=2024-05-02", headers=headers).headers["location"]
        assert [client.get(path, headers=headers).status_code for path in (request, many)] == [200, 200]
        assert client.get("/process-requests/1/events", headers=headers).status_code == 404
        for path in ("/process-requests", "/country-stats?from=2024-05-01&to=2024-05-02"):
            assert client.get(path, headers=headers).status_code == 403


def test_clients_without_keys_have_a_rate_limit_for_processing() -> None:
    """Without API keys, processing dates is limited, and reading is not."""
    with World().client(api_access="open", api_requests_per_minute=2) as client:
        assert [client.post(ASK).status_code for _ in range(3)] == [202, 202, 429]
        assert [client.get("/process-requests").status_code for _ in range(3)] == [200] * 3


def test_rate_limit_of_a_key_is_429_with_retry_after() -> None:
    """A key over its limit for all operations gets 429 with Retry-After; other keys are not affected."""
    with World().client(api_access="keys", api_keys=KEYS, api_requests_per_minute=2) as client:
        paths = ("/process-requests", "/process-requests/1")
        statuses = [client.get(path, headers={"X-API-Key": READER}).status_code for path in paths]
        refused = client.get("/process-requests", headers={"X-API-Key": READER})
        assert (statuses, refused.status_code) == ([200, 404], 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["content-type"] == "application/problem+json"
        assert client.get("/process-requests", headers={"X-API-Key": NIGHTLY}).status_code == 200


def test_unknown_keys_are_limited_and_known_ones_work() -> None:
    """An address that tries keys gets 429; a known key of the same address works, and no key is still 401."""
    with World().client(api_access="keys", api_keys=KEYS) as client:
        tried = [client.get("/process-requests", headers={"X-API-Key": mint_key()}) for _ in range(40)]
        assert [response.status_code for response in tried[:30]] == [401] * 30
        assert tried[-1].status_code == 429
        assert int(tried[-1].headers["retry-after"]) >= 1
        assert "unknown API keys" in tried[-1].json()["detail"]
        assert client.get("/process-requests", headers={"X-API-Key": READER}).status_code == 200
        assert client.get("/process-requests").status_code == 401


def test_rate_limiter_refills_a_minute_at_most() -> None:
    """Unused tokens accumulate for a minute at most, and the returned wait is exact."""
    now_s = 0.0
    rate = RateLimiter(6, clock=lambda: now_s)
    assert [rate.take("a") for _ in range(7)] == [0] * 6 + [10]
    now_s = 10.0
    assert [rate.take("a"), rate.take("a")] == [0, 10]
    now_s = 10_000.0
    assert [rate.take("a") for _ in range(7)] == [0] * 6 + [10]


def test_a_key_file_has_one_key_per_line(tmp_path: Path) -> None:
    """A key file has one key per line, each with optional scopes."""
    file = tmp_path / "keys"
    file.write_text(f"# dashboards\nreader:read:{digest_of(READER)}\n\nnightly:process:{digest_of(NIGHTLY)}\n")
    keys = parse_keys(file.read_text().splitlines())
    assert [(key.name, key.scopes) for key in keys] == [
        ("reader", frozenset({Scope.READ})),
        ("nightly", frozenset({Scope.PROCESS})),
    ]
    with World().client(api_access="keys", api_keys_file=str(file)) as client:
        assert client.get("/process-requests", headers={"X-API-Key": READER}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "TRIPFOLD_API_ACCESS=open"),
        ({"api_keys": f"reader:write:{digest_of(READER)}"}, "read, process or read"),
        ({"api_keys": f"reader:read:{READER}"}, "sha256"),
        ({"api_keys": f"{KEYS},{KEYS}"}, "two API keys have the name reader"),
        ({"api_keys": f"reader:read:{digest_of(READER)}:2027-02-30"}, "reader expires at 2027-02-30, which is no"),
        ({"api_keys": f"reader:read:{digest_of(READER)}:2027-01-31T18:00"}, "a time in UTC like 2027-01-31"),
        ({"api_keys_file": "/nowhere/keys"}, "cannot be read: No such file"),
        ({"api_keys_file": "/dev/zero"}, "is longer than 1,048,576 bytes"),
        ({"api_access": "open", "api_keys": KEYS}, "API keys are named: unset TRIPFOLD_API_ACCESS"),
        ({"api_access": "open", "api_keys_file": "/nowhere/keys"}, "API keys are named: unset TRIPFOLD_API_ACCESS"),
    ],
)
def test_invalid_access_settings_stop_the_start(settings: dict[str, str], told: str) -> None:
    """Invalid access settings raise an error that repeats no key."""
    with pytest.raises(InvalidAccessSettings, match=told) as refused:
        access_of(Settings.model_validate(settings))
    assert READER not in str(refused.value)


@pytest.mark.parametrize(
    ("expires", "moment"),
    [
        ("2024-06-02", dt.datetime(2024, 6, 2, tzinfo=dt.UTC)),
        ("2024-06-01T18:30Z", dt.datetime(2024, 6, 1, 18, 30, tzinfo=dt.UTC)),
    ],
)
def test_an_expired_key_is_401_from_its_time_on(expires: str, moment: dt.datetime) -> None:
    """A key works until its time in UTC; a date means its first moment. The response says that the key has expired."""
    world = World()
    entry = f"reader:read:{digest_of(READER)}:{expires}"
    with world.client(api_access="keys", api_keys=entry) as client:
        world.clock.now = moment - dt.timedelta(microseconds=1)
        assert client.get("/process-requests", headers={"X-API-Key": READER}).status_code == 200
        world.clock.now = moment
        refused = client.get("/process-requests", headers={"X-API-Key": READER})
        assert refused.status_code == 401
        assert f'Key "reader" expired at {moment:%Y-%m-%d %H:%M} UTC' in refused.json()["detail"]


def test_the_openapi_document_asks_for_a_key_only_where_needed() -> None:
    """The OpenAPI document asks for a key only where the API needs one."""
    for keys in ("", KEYS):
        with World().client(api_access="open-without-keys", api_keys=keys) as client:
            paths = client.get("/schema/openapi.json").json()["paths"]
        without_key: list[dict[str, list[str]]] = [] if keys else [{}]
        assert paths["/process-requests"]["get"]["security"] == [*without_key, {"key": []}, {"bearer": []}]
        assert paths["/health/live"]["get"]["security"] == [{}]
