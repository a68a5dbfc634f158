"""Backfills over HTTP: made, previewed, listed, followed and changed."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from services.api.backfills.service import detail_of
from services.api.requests.event_stream import event_of
from shared.domain import keys, objects
from shared.domain.backfills import DateEnd, concluded, request_id_of, touched, with_end, with_request
from shared.domain.ids import RequestId
from shared.domain.objects import Backfill, OpenBackfills
from shared.storage import backfills as storage
from tests.fakes.api import NOW, Client, World

PATH = "/backfills?from=2024-05-01&to=2024-05-04"
FIRST = dt.date(2024, 5, 1)


def read(world: World, backfill_id: str) -> Backfill:
    """Return a backfill of the bucket."""
    key = keys.backfill(RequestId(backfill_id))
    return objects.decode(Backfill, world.store.objects[key].body, key)


def put(world: World, backfill: Backfill) -> None:
    """Write a backfill into the bucket, as a planner does."""
    world.store.write(keys.backfill(backfill.backfill_id), objects.encode(backfill))


def open_ids(world: World) -> tuple[str, ...]:
    """Return the ids of the open backfills."""
    stored = world.store.objects[keys.OPEN_BACKFILLS]
    return objects.decode(OpenBackfills, stored.body, keys.OPEN_BACKFILLS).backfill_ids


def test_a_backfill_is_stored_and_shown(world: World, client: Client) -> None:
    """The response is the backfill, which is open; its location returns the same, and the list has it."""
    response = client.post(f"{PATH}&only=all&order=newest-first&max_parallel=3")
    body = response.json()
    assert (response.status_code, response.headers["location"]) == (202, f"/backfills/{body['id']}")
    shown = {name: body[name] for name in ("from", "to", "only", "order", "max_parallel", "status", "estimated_end")}
    assert shown == {
        "from": "2024-05-01",
        "to": "2024-05-04",
        "only": "all",
        "order": "newest-first",
        "max_parallel": 3,
        "status": "running",
        "estimated_end": None,
    }
    assert open_ids(world) == (body["id"],)
    assert client.get(response.headers["location"]).json() == body
    (listed,) = client.get("/backfills").json()["backfills"]
    assert listed.items() <= body.items()


def test_the_list_has_pages_and_names_unreadable_backfills(world: World, client: Client) -> None:
    """The newest backfill comes first, ``next`` leads to the others, and an unreadable one is named."""
    ids = []
    for _ in range(3):
        ids.append(client.post(PATH).json()["id"])
        world.clock.advance(1)
    world.store.write(keys.backfill(RequestId(ids[0])), b"{")
    first = client.get("/backfills?limit=2").json()
    assert [one["id"] for one in first["backfills"]] == [ids[2], ids[1]]
    rest = client.get(first["next"]).json()
    assert (rest["backfills"], [one["key"] for one in rest["unreadable"]], rest["next"]) == (
        [],
        [keys.backfill(RequestId(ids[0]))],
        None,
    )
    assert client.get(f"/backfills/{ids[0]}").status_code == 500


INVALID = (
    ("from=2024-05-01", "to"),
    ("from=2024-05-02&to=2024-05-01", "from"),
    ("from=2005-01-01&to=2024-05-01", "to"),
    ("from=1999-12-31&to=2000-01-01", "from"),
    ("from=2024-05-01&to=2024-05-02&only=some", "only"),
    ("from=2024-05-01&to=2024-05-02&order=random", "order"),
    ("from=2024-05-01&to=2024-05-02&max_parallel=0", "max_parallel"),
    ("from=2024-05-01&to=2024-05-02&max_parallel=17", "max_parallel"),
)
"""Queries that are refused, and the parameter that the response names."""


def test_an_invalid_backfill_is_refused_in_one_sentence(world: World, client: Client) -> None:
    """Each invalid parameter is named, and nothing is stored."""
    for query, name in INVALID:
        response = client.post(f"/backfills?{query}")
        named = [fault["name"] for fault in response.json()["invalid_parameters"]]
        assert (response.status_code, named) == (400, [name]), query
    assert world.store.bodies(keys.BACKFILLS) == {}


def test_a_dry_run_names_the_dates_and_stores_nothing(world: World, client: Client) -> None:
    """A preview has the dates in their order; dates without a plan are missing, and none of them has failed."""
    body = client.post(f"{PATH}&only=missing&order=newest-first&dry_run=true").json()
    assert (body["dates_total"], body["dates_selected"], body["dates"][0]) == (4, 4, "2024-05-04")
    assert client.post(f"{PATH}&only=failed&dry_run=true").json()["dates_selected"] == 0
    assert world.store.bodies(keys.BACKFILLS) == {}


def test_the_same_key_gives_the_same_backfill(world: World, client: Client) -> None:
    """A repeated call with the key returns the same backfill; another one with the key is refused."""
    key = {"Idempotency-Key": "history"}
    first, second = (client.post(PATH, headers=key).json()["id"] for _ in range(2))
    assert (first, open_ids(world)) == (second, (first,))
    assert client.post(f"{PATH}&max_parallel=4", headers=key).status_code == 422


def test_too_many_open_backfills_are_refused(world: World, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the limit and the remedy."""
    monkeypatch.setattr(storage, "OPEN_MAX", 1)
    assert client.post(PATH).status_code == 202
    response = client.post(PATH)
    assert (response.status_code, "1 backfills are open, which is the limit" in response.json()["detail"]) == (
        409,
        True,
    )
    assert len(world.store.bodies(keys.BACKFILLS)) == 1


def test_a_backfill_is_paused_resumed_retried_and_cancelled(world: World, client: Client) -> None:
    """Each change shows in the response; one that the state does not allow is 409, and an unknown id 404."""
    backfill_id = client.post(PATH).json()["id"]
    where = f"/backfills/{backfill_id}"
    assert client.post(f"{where}/pause").json()["status"] == "paused"
    assert client.post(f"{where}/resume").json()["status"] == "running"
    refused = client.post(f"{where}/retry")
    assert (refused.status_code, "none of its dates has failed" in refused.json()["detail"]) == (409, True)
    before = read(world, backfill_id)
    ended = with_end(with_request(before, 0), 0, DateEnd.FAILED)
    for position in (1, 2, 3):
        ended = with_end(ended, position, DateEnd.COMPLETED)
    put(world, touched(before, concluded(ended), NOW + dt.timedelta(hours=1)))
    world.store.write(keys.OPEN_BACKFILLS, objects.encode(OpenBackfills()))
    body = client.get(where).json()
    assert (body["status"], body["dates_per_hour"]) == ("completed with failures", 4.0)
    request_id = request_id_of(before, FIRST)
    assert body["failed"] == [{"date": "2024-05-01", "request_id": request_id}]
    assert client.post(f"{where}/retry").json()["status"] == "running"
    assert open_ids(world) == (backfill_id,)
    assert client.delete(where).json()["status"] == "cancelled"
    assert client.delete(where).status_code == 202
    actions = [one.action for one in read(world, backfill_id).actions]
    assert actions == ["make", "pause", "resume", "retry", "cancel"]
    assert client.post(f"{where}/resume").status_code == 409
    assert client.post("/backfills/none/pause").status_code == 404


def test_a_backfill_is_followed_to_its_end(world: World, client: Client) -> None:
    """The stream shows the state and ends with the backfill; a client that has the last event gets 204."""
    backfill_id = client.post("/backfills?from=2024-05-01&to=2024-05-01").json()["id"]
    ended = concluded(with_end(read(world, backfill_id), 0, DateEnd.COMPLETED))
    put(world, msgspec.structs.replace(ended, version=7))
    response = client.get(f"/backfills/{backfill_id}/events")
    assert response.content == b"retry: 2000\n\n" + event_of(7, detail_of(read(world, backfill_id)))
    assert client.get(f"/backfills/{backfill_id}/events", headers={"Last-Event-ID": "7"}).status_code == 204
