"""Schedules over HTTP: made, changed, run, listed and deleted."""

from __future__ import annotations

import datetime as dt
from urllib.parse import quote

import msgspec
import pytest

from services.api.schedules import service
from shared.domain import keys, objects
from shared.domain.objects import Backfill, BackfillStatus, Deadline, Schedule
from tests.fakes.api import Client, World, metric

PATH = f"/schedules/daily?cron={quote('0 6 * * *')}&timezone=Europe/Prague&recheck=7&complete_by=09:00"


def stored(world: World) -> Schedule:
    """Return the schedule of the bucket."""
    return objects.decode(Schedule, world.store.objects[keys.schedule("daily")].body, keys.schedule("daily"))


def test_a_schedule_is_made_shown_and_changed(client: Client) -> None:
    """A schedule has the options given, and its next run; a second call replaces the options and keeps the rest."""
    body = client.put(PATH).json()
    options = ("name", "cron", "timezone", "date", "recheck", "max_parallel", "complete_by", "paused", "next_run")
    assert {option: body[option] for option in options} == {
        "name": "daily",
        "cron": "0 6 * * *",
        "timezone": "Europe/Prague",
        "date": -1,
        "recheck": 7,
        "max_parallel": 2,
        "complete_by": "09:00",
        "paused": False,
        "next_run": "2024-06-02T04:00:00Z",
    }
    assert client.get("/schedules/daily").json() == body
    assert client.get("/schedules").json()["schedules"] == [body]
    changed = client.put(f"/schedules/daily?cron={quote('30 22 * * 1-5')}").json()
    assert (changed["cron"], changed["timezone"], changed["complete_by"]) == ("30 22 * * 1-5", "UTC", None)
    assert (changed["created_at"], changed["version"]) == (body["created_at"], body["version"] + 1)


INVALID = (
    ("/schedules/daily", "cron", "it is missing. For example: cron=0 6 * * *"),
    ("/schedules/daily?cron=6", "cron", "'6' must have five fields"),
    (f"/schedules/daily?cron={quote('0 25 * * *')}", "cron", "'0 25 * * *' has an invalid hour"),
    (f"/schedules/daily?cron={quote('0 6 * * *')}&timezone=Mars", "timezone", "'Mars' is not a time zone"),
    (f"/schedules/Daily?cron={quote('0 6 * * *')}", "name", "'Daily' must be 1 to 63 lower-case letters"),
    (f"/schedules/daily?cron={quote('0 6 * * *')}&complete_by=9", "complete_by", "'9' must be a time of day"),
    (f"/schedules/daily?cron={quote('0 6 * * *')}&recheck=32", "recheck", "it must be 31 or less"),
)
"""Paths that are refused, the parameter that the response names, and the reason."""


def test_an_invalid_schedule_is_refused_in_one_sentence(world: World, client: Client) -> None:
    """The response names the parameter, the value and the remedy, and nothing is stored."""
    for path, name, reason in INVALID:
        response = client.put(path)
        (fault,) = response.json()["invalid_parameters"]
        assert (response.status_code, fault["name"], reason in fault["reason"]) == (400, name, True), path
    assert world.store.bodies(keys.SCHEDULES) == {}


def test_a_schedule_runs_now_once(world: World, client: Client) -> None:
    """A run has a backfill of its dates at once; a second one is refused until the first has ended."""
    client.put(PATH)
    response = client.post("/schedules/daily/run")
    run = response.json()["last_run"]
    assert (response.status_code, run["from"], run["to"], run["status"]) == (
        202,
        "2024-05-24",
        "2024-05-31",
        "running",
    )
    assert client.get(f"/backfills/{run['backfill_id']}").json()["schedule"] == "daily"
    action = stored(world).actions[-1]
    assert (action.action, action.client, action.result) == ("run", "testclient", f"backfill {run['backfill_id']}")
    refused = client.post("/schedules/daily/run")
    assert (refused.status_code, run["backfill_id"] in refused.json()["detail"]) == (409, True)
    ((key, body),) = world.store.bodies(keys.BACKFILLS).items()
    ended = msgspec.structs.replace(objects.decode(Backfill, body, key), status=BackfillStatus.COMPLETED)
    world.store.write(key, objects.encode(ended))
    world.clock.advance(1)
    assert client.post("/schedules/daily/run").status_code == 202
    assert [one.action for one in stored(world).actions] == ["set", "run", "run"]


def test_a_schedule_that_is_deleted_before_its_run_is_claimed_is_not_found(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response is that of a schedule that does not exist, not that of one whose last run goes on."""

    async def find_none(*_: object, **__: object) -> None:
        """Find no schedule any more."""

    client.put(PATH)
    monkeypatch.setattr(service, "claim_run", find_none)
    assert client.post("/schedules/daily/run").status_code == 404


def test_a_schedule_is_paused_resumed_and_deleted(world: World, client: Client) -> None:
    """A paused schedule has no next run; a deleted one is gone, and 404 like one that never was."""
    client.put(PATH)
    assert client.post("/schedules/daily/pause").json()["next_run"] is None
    assert client.post("/schedules/daily/pause").status_code == 200
    assert client.post("/schedules/daily/resume").json()["next_run"] == "2024-06-02T04:00:00Z"
    assert [action.action for action in stored(world).actions] == ["set", "pause", "resume"]
    assert client.delete("/schedules/daily").status_code == 204
    for method, path in (
        ("GET", "daily"),
        ("DELETE", "daily"),
        ("POST", "daily/pause"),
        ("POST", "daily/run"),
        ("GET", "Daily"),
    ):
        assert client.request(method, f"/schedules/{path}").status_code == 404, (method, path)


def test_late_dates_are_shown(world: World, client: Client) -> None:
    """A date that a planner found incomplete after its deadline is late; one with time left is not."""
    client.put(PATH)
    at = dt.datetime(2024, 6, 1, 7, tzinfo=dt.UTC)
    deadlines = tuple(Deadline(date=dt.date(2024, 5, day), at=at, late=day == 30) for day in (30, 31))
    world.store.write(
        keys.schedule("daily"), objects.encode(msgspec.structs.replace(stored(world), deadlines=deadlines))
    )
    assert client.get("/schedules/daily").json()["late"] == [{"date": "2024-05-30", "deadline": "2024-06-01T07:00:00Z"}]


def test_too_many_schedules_are_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new schedule beyond the limit is refused; an existing one can be changed."""
    monkeypatch.setattr(service, "SCHEDULES_MAX", 1)
    assert client.put(PATH).status_code == 200
    response = client.put(PATH.replace("daily", "other"))
    assert (response.status_code, "there are 1 schedules" in response.json()["detail"].lower()) == (409, True)
    assert client.put(PATH).status_code == 200


def test_an_unreadable_schedule_is_named(world: World, client: Client) -> None:
    """The list leaves out a schedule that cannot be read, and names it; a metric counts it."""
    client.put(PATH)
    before = metric(client, "tripfold_unreadable_objects_total", kind="schedule")
    world.store.write(keys.schedule("bad"), b"{")
    body = client.get("/schedules").json()
    assert ([one["name"] for one in body["schedules"]], [one["key"] for one in body["unreadable"]]) == (
        ["daily"],
        [keys.schedule("bad")],
    )
    assert metric(client, "tripfold_unreadable_objects_total", kind="schedule") == before + 1
    client.put(PATH.replace("daily", "gone"))
    gone = msgspec.structs.replace(stored(world), name="gone", timezone="Mars/Base")
    world.store.write(keys.schedule("gone"), objects.encode(gone))
    (_, unusable) = client.get("/schedules").json()["unreadable"]
    assert (unusable["key"], "'Mars/Base' is not a time zone" in unusable["reason"]) == (keys.schedule("gone"), True)
    assert client.get("/schedules/gone").json()["title"] == "Unreadable object"
    assert client.put(PATH.replace("daily", "gone")).status_code == 200
