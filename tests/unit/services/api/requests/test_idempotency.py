"""Repeated requests with the same idempotency key."""

from __future__ import annotations

import asyncio
import datetime as dt

import pytest

from services.api.requests.idempotency import Claims
from shared.domain import keys
from shared.domain.events import ProcessRequested
from shared.domain.ids import RequestId, mint_request_id
from shared.domain.topics import Topic
from shared.storage import active_requests
from tests.fakes.api import DAY, NOW, Client, World

KEY = {"Idempotency-Key": "nightly-2024-05-01"}
PATH = "/process-request?date=2024-05-01"


def published_ids(world: World) -> list[str]:
    """Return the ids of the requests that were published."""
    events = world.published(Topic.PROCESS_REQUESTS)
    return [event.request_id for event in events if isinstance(event, ProcessRequested)]


def test_same_key_and_date_return_the_same_request(world: World, client: Client) -> None:
    """The same key and date give the same request, and it is published once."""
    first, second = (client.post(PATH, headers=KEY) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    assert published_ids(world) == [first.json()["id"]]


async def test_each_key_keeps_the_request_that_it_joined(world: World, client: Client) -> None:
    """Two keys join the waiting request; once it is started, a third key gets another, and both keep theirs."""
    another, later = {"Idempotency-Key": "another"}, {"Idempotency-Key": "later"}
    first, second = (client.post(PATH, headers=headers).json()["id"] for headers in (KEY, another))
    assert first == second
    assert await active_requests.begin(world.store, DAY, RequestId(first), NOW)
    assert client.post(PATH, headers=later).json()["id"] != first
    assert [client.post(PATH, headers=headers).json()["id"] for headers in (KEY, another)] == [first, first]


def test_reused_key_with_another_date_is_422(world: World, client: Client) -> None:
    """The same key with another date is refused, names both, and publishes nothing."""
    client.post(PATH, headers=KEY)
    response = client.post("/process-request?date=2024-05-02", headers=KEY)
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert response.json()["type"] == "urn:problem-type:tripfold:idempotency-key-reused"
    assert "date=2024-05-01" in response.json()["detail"]
    assert "date=2024-05-02" in response.json()["detail"]
    assert len(published_ids(world)) == 1


def test_key_is_free_again_after_24_hours(world: World, client: Client) -> None:
    """After 24 hours a key is free again, for any date."""
    first = client.post(PATH, headers=KEY)
    world.clock.now = NOW + dt.timedelta(hours=24)
    second = client.post("/process-request?date=2024-05-02", headers=KEY)
    assert second.status_code == 202
    assert first.json()["id"] != second.json()["id"]


def test_claimed_and_unpublished_request_is_published_by_the_next_try(world: World, client: Client) -> None:
    """After a crash between claim and publish, the next try publishes the request under the claimed id."""
    world.publisher.down = True
    assert client.post(PATH, headers=KEY).status_code == 503
    world.publisher.down = False
    again = client.post(PATH, headers=KEY)
    assert again.status_code == 202
    assert published_ids(world) == [again.json()["id"]]
    assert client.post(PATH, headers=KEY).json()["id"] == again.json()["id"]


def test_key_is_claimed_before_publishing(world: World, client: Client) -> None:
    """While the key cannot be claimed, nothing is published."""
    world.store.down = True
    assert client.post(PATH, headers=KEY).status_code == 503
    assert published_ids(world) == []


@pytest.mark.parametrize("key", ["", "two words", "x" * 256])
def test_malformed_key_is_400(world: World, client: Client, key: str) -> None:
    """A key that is empty, has spaces, or is too long is refused, and nothing is published."""
    response = client.post(PATH, headers={"Idempotency-Key": key})
    assert response.status_code == 400
    assert [fault["name"] for fault in response.json()["invalid_parameters"]] == ["Idempotency-Key"]
    assert published_ids(world) == []


async def test_concurrent_claims_get_the_id_of_the_first(world: World) -> None:
    """Concurrent claims of a key all get the id of the first."""
    claims = Claims(world.store, clock=world.clock)

    async def choose() -> RequestId:
        return mint_request_id(NOW)

    ids = await asyncio.gather(*(claims.claim("key", "date=2024-05-01", choose) for _ in range(20)))
    assert len(set(ids)) == 1
    assert len(world.store.bodies(keys.idempotency("")[:12])) == 1
