"""Requests for a range of dates."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from services.api.requests.ranges import status_of_all
from shared.domain import keys
from shared.domain.events import Outcome, ProcessRequested
from shared.domain.ids import RequestId
from shared.domain.requests import Status, new_record
from shared.domain.topics import Topic
from tests.fakes.api import NOW, Client, World, write

PATH = "/process-request?from=2024-05-01&to=2024-05-03"
DATES = [dt.date(2024, 5, day) for day in (1, 2, 3)]


def published(world: World) -> list[tuple[str, dt.date]]:
    """Return the ids and dates of the requests that were published, by date."""
    events = world.published(Topic.PROCESS_REQUESTS)
    found = [(event.request_id, event.date) for event in events if isinstance(event, ProcessRequested)]
    return sorted(found, key=lambda pair: pair[1])


def test_a_range_makes_a_request_per_date(world: World, client: Client) -> None:
    """Each date of a range has its own request, and Location leads to all of them."""
    response = client.post(PATH)
    body = response.json()
    assert (response.status_code, response.headers["location"]) == (202, f"/process-ranges/{body['id']}")
    assert (body["from"], body["to"], body["status"]) == ("2024-05-01", "2024-05-03", "accepted")
    assert [(one["id"], dt.date.fromisoformat(one["date"])) for one in body["requests"]] == published(world)
    assert [date for _, date in published(world)] == DATES
    assert client.get(response.headers["location"]).json() == body
    assert all(client.get(f"/process-requests/{one['id']}").json()["status"] == "accepted" for one in body["requests"])


def test_progress_of_a_range_sums_its_dates(world: World, client: Client) -> None:
    """A range sums its dates, and has ended when all of them have."""
    where = client.post(PATH).headers["location"]
    for number, (request_id, date) in enumerate(published(world), start=1):
        record = new_record(RequestId(request_id), date)
        write(
            world,
            msgspec.structs.replace(
                record, planned=True, cities=2, outcomes={Outcome.STORED: "3"}, served="3", bytes_done=number
            ),
        )
        body = client.get(where).json()
        assert body["status"] == ("completed" if number == 3 else "running")
        assert body["counts"]["cities_done"] == 2 * number
    assert body["counts"]["bytes_done"] == 6


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("from=2024-05-01", "to"),
        ("to=2024-05-01", "from"),
        ("date=2024-05-01&from=2024-05-01&to=2024-05-02", "date"),
        ("from=2024-05-02&to=2024-05-01", "from"),
        ("from=2024-05-01&to=2024-06-01", "to"),
    ],
)
def test_invalid_range_is_400(world: World, client: Client, query: str, name: str) -> None:
    """A range that is half, beside a date, backwards or too long is refused, and nothing is published."""
    response = client.post(f"/process-request?{query}")
    assert (response.status_code, [fault["name"] for fault in response.json()["invalid_parameters"]]) == (400, [name])
    assert published(world) == []


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("date=1999-12-31", "date"),
        ("date=9999-12-31", "date"),
        ("date=2025-06-03", "date"),
        ("from=1999-12-31&to=2000-01-01", "from"),
    ],
)
def test_date_out_of_bounds_is_refused(world: World, client: Client, query: str, name: str) -> None:
    """A date before 2000 or more than 366 days ahead is refused with the dates that are accepted."""
    response = client.post(f"/process-request?{query}")
    (fault,) = response.json()["invalid_parameters"]
    assert (response.status_code, fault["name"]) == (400, name)
    assert "is not between 2000-01-01 and 2025-06-02" in fault["reason"]
    assert published(world) == []
    assert client.post("/process-request?date=2025-06-02").status_code == 202


def test_same_key_returns_the_same_range(world: World, client: Client) -> None:
    """The same key gives the same range, also when Kafka was down in between; another range is refused."""
    key = {"Idempotency-Key": "may"}
    world.publisher.down = True
    assert client.post(PATH, headers=key).status_code == 503
    world.publisher.down = False
    first, second = (client.post(PATH, headers=key).json() for _ in range(2))
    assert first == second
    assert [one["id"] for one in first["requests"]] == [request_id for request_id, _ in published(world)]
    assert client.post("/process-request?date=2024-05-01", headers=key).status_code == 422


def test_prefer_wait_works_for_ranges(world: World, client: Client) -> None:
    """A client can wait for a range like for a request."""
    response = client.post(PATH, headers={"Prefer": "wait=0"})
    assert (response.status_code, response.headers["preference-applied"]) == (202, "wait=0")
    assert len(published(world)) == 3
    assert client.get("/process-ranges/none").status_code == 404


def test_unreadable_request_is_named_and_the_others_are_served(world: World, client: Client) -> None:
    """A range leaves out a request whose record cannot be read, names it, and can still be cancelled."""
    body = client.post(PATH).json()
    first, *rest = (RequestId(one["id"]) for one in body["requests"])
    world.store.write(keys.request(first), b'{"request_id":')
    where = f"/process-ranges/{body['id']}"
    for response, status in ((client.get(where), 200), (client.delete(where), 202)):
        shown = response.json()
        assert response.status_code == status
        assert [one["id"] for one in shown["requests"]] == rest
        assert [one["key"] for one in shown["unreadable"]] == [keys.request(first)]
        assert keys.request(first) in response.headers["tripfold-unreadable"]
        assert shown["status"] == "running"


def test_unreadable_request_counts_as_failed(world: World, client: Client) -> None:
    """A range whose requests are all unreadable is failed, so that clients stop waiting."""
    body = client.post(PATH).json()
    for one in body["requests"]:
        world.store.write(keys.request(RequestId(one["id"])), b"[]")
    assert client.get(f"/process-ranges/{body['id']}").json()["status"] == "failed"


def test_cancelling_a_range_cancels_its_unfinished_requests(world: World, client: Client) -> None:
    """Cancelling a range cancels each request that has not ended; a range without any is 409."""
    body = client.post(PATH).json()
    first, *rest = (RequestId(one["id"]) for one in body["requests"])
    done = msgspec.structs.replace(
        new_record(first, dt.date(2024, 5, 1)), planned=True, cities=1, outcomes={Outcome.STORED: "1"}, served="1"
    )
    write(world, done)
    where = f"/process-ranges/{body['id']}"
    response = client.delete(where)
    assert response.status_code == 202
    assert [bool(one["cancelled_at"]) for one in response.json()["requests"]] == [False, True, True]
    for request_id in rest:
        record = new_record(request_id, dt.date(2024, 5, 2))
        write(world, msgspec.structs.replace(record, cancelled_at=NOW, failed_reason="the request was cancelled"))
    assert client.get(where).json()["status"] == "cancelled"
    assert client.delete(where).status_code == 409
    assert client.delete("/process-ranges/none").status_code == 404


@pytest.mark.parametrize(
    ("statuses", "together"),
    [
        ([Status.COMPLETED, Status.CANCELLED], Status.CANCELLED),
        ([Status.RUNNING, Status.CANCELLED], Status.RUNNING),
        ([Status.FAILED, Status.FAILED], Status.FAILED),
        ([Status.COMPLETED, Status.FAILED], Status.COMPLETED_WITH_FAILURES),
        ([Status.COMPLETED, Status.ACCEPTED], Status.RUNNING),
        ([Status.PLANNED, Status.ACCEPTED], Status.PLANNED),
    ],
)
def test_range_ends_when_each_request_has(statuses: list[Status], together: Status) -> None:
    """Several requests have ended only when each of them has."""
    assert status_of_all(statuses) is together
