"""Ranges of dates in the deprecated form: a backfill with the request of each date."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest
from msgspec import UNSET

from services.api.backfills.ranges import status_of_all
from shared.domain import keys, objects
from shared.domain.backfills import MAX_PARALLEL_MAX, request_id_of
from shared.domain.events import Outcome
from shared.domain.ids import RequestId
from shared.domain.objects import Backfill, BackfillStatus, DateSelection
from shared.domain.requests import Status, new_record
from tests.fakes.api import Client, World, write

PATH = "/process-request?from=2024-05-01&to=2024-05-03"
DATES = [dt.date(2024, 5, day) for day in (1, 2, 3)]


def stored(world: World) -> Backfill:
    """Return the only backfill of the bucket."""
    ((key, body),) = world.store.bodies(keys.BACKFILLS).items()
    return objects.decode(Backfill, body, key)


def test_a_range_is_a_backfill(world: World, client: Client) -> None:
    """A range makes a backfill of every date; it shows the request of each, and says that it is deprecated."""
    response = client.post(PATH)
    body, backfill = response.json(), stored(world)
    assert (response.status_code, response.headers["location"]) == (202, f"/process-ranges/{backfill.backfill_id}")
    assert (body["from"], body["to"], body["status"]) == ("2024-05-01", "2024-05-03", "accepted")
    assert (backfill.first, backfill.last, backfill.selection) == (DATES[0], DATES[2], DateSelection.ALL)
    assert (backfill.background, backfill.max_parallel) == (UNSET, MAX_PARALLEL_MAX)  # its requests are not delayed
    assert [one["id"] for one in body["requests"]] == [request_id_of(backfill, date) for date in DATES]
    shown = client.get(response.headers["location"])
    assert shown.json() == body
    assert shown.headers["deprecation"].startswith("@")
    assert client.get(f"/backfills/{backfill.backfill_id}").json()["counts"]["dates_total"] == 3


def test_progress_of_a_range_sums_its_dates(world: World, client: Client) -> None:
    """A range sums its dates, and has ended when all of them have."""
    where = client.post(PATH).headers["location"]
    for number, date in enumerate(DATES, start=1):
        record = new_record(request_id_of(stored(world), date), date)
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


INVALID = (
    ("from=2024-05-01", "to"),
    ("to=2024-05-01", "from"),
    ("date=2024-05-01&from=2024-05-01&to=2024-05-02", "date"),
    ("from=2024-05-02&to=2024-05-01", "from"),
    ("from=2024-05-01&to=2024-06-01", "to"),
    ("from=1999-12-31&to=2000-01-01", "from"),
)
"""Queries that are refused, and the parameter that the response names."""


def test_invalid_range_is_400(world: World, client: Client) -> None:
    """A range that is half, beside a date, backwards, too long or too early is refused, and nothing is stored."""
    for query, name in INVALID:
        response = client.post(f"/process-request?{query}")
        named = [fault["name"] for fault in response.json()["invalid_parameters"]]
        assert (response.status_code, named) == (400, [name]), query
    assert world.store.bodies(keys.BACKFILLS) == {}


def test_same_key_returns_the_same_range(client: Client) -> None:
    """The same key gives the same range; another range is refused."""
    key = {"Idempotency-Key": "may"}
    first, second = (client.post(PATH, headers=key).json() for _ in range(2))
    assert first == second
    assert client.post("/process-request?date=2024-05-01", headers=key).status_code == 422


def test_prefer_wait_works_for_ranges(client: Client) -> None:
    """A client can wait for a range like for a request."""
    response = client.post(PATH, headers={"Prefer": "wait=0"})
    assert (response.status_code, response.headers["preference-applied"]) == (202, "wait=0")
    assert client.get("/process-ranges/none").status_code == 404


def test_unreadable_request_is_named_and_counts_as_failed(world: World, client: Client) -> None:
    """A range leaves out a request whose record cannot be read, and names it; if all are, the range has failed."""
    body = client.post(PATH).json()
    first, *rest = (RequestId(one["id"]) for one in body["requests"])
    where = f"/process-ranges/{body['id']}"
    world.store.write(keys.request(first), b'{"request_id":')
    response = client.get(where)
    assert [one["id"] for one in response.json()["requests"]] == rest
    assert [one["key"] for one in response.json()["unreadable"]] == [keys.request(first)]
    assert keys.request(first) in response.headers["tripfold-unreadable"]
    for request_id in rest:
        world.store.write(keys.request(request_id), b"[]")
    assert client.get(where).json()["status"] == "failed"


def test_cancelling_a_range_cancels_its_backfill(world: World, client: Client) -> None:
    """A cancelled range cancels its backfill, and shows dates that were never requested as cancelled."""
    where = client.post(PATH).headers["location"]
    response = client.delete(where)
    assert (response.status_code, stored(world).status) == (202, BackfillStatus.CANCELLED)
    assert [one["status"] for one in response.json()["requests"]] == ["cancelled"] * 3
    assert client.get(where).json()["status"] == "cancelled"
    ended = msgspec.structs.replace(stored(world), status=BackfillStatus.COMPLETED)
    world.store.write(keys.backfill(ended.backfill_id), objects.encode(ended))
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
