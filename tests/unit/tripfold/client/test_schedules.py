"""The commands for schedules, against the API."""

from __future__ import annotations

import datetime as dt

import msgspec
from typer.testing import CliRunner, Result

from shared.domain import keys, objects
from shared.domain.objects import Deadline, Schedule
from tests.fakes.api import World
from tests.serving import served
from tripfold import cli


def test_schedules_are_set_listed_run_and_deleted() -> None:
    """Each command prints the schedule with its next and last run; a late date is exit 1 of the list."""
    world = World()
    runner = CliRunner()
    with served(world) as url:

        def run(*arguments: str) -> Result:
            return runner.invoke(cli.app, ["schedule", *arguments, "--api", url])

        made = run("set", "daily", "--cron", "0 6 * * *", "--timezone", "Europe/Prague", "--complete-by", "09:00")
        assert "daily: '0 6 * * *' in Europe/Prague, next run at 2024-06-02 04:00 UTC" in made.output
        assert "date -1, 0 days before it again, 2 at once, complete by 09:00" in made.output
        assert "paused" in run("pause", "daily").output
        assert "next run at" in run("resume", "daily").output
        assert "last run: 2024-05-31..2024-05-31, running. Watch it:" in run("run", "daily").output
        listed = run("list")
        assert (listed.exit_code, "2024-05-31..2024-05-31 running" in listed.output) == (0, True)
        schedule = objects.decode(Schedule, world.store.objects[keys.schedule("daily")].body, keys.schedule("daily"))
        late = Deadline(date=dt.date(2024, 5, 31), at=dt.datetime(2024, 6, 1, 7, tzinfo=dt.UTC), late=True)
        world.store.write(keys.schedule("daily"), objects.encode(msgspec.structs.replace(schedule, deadlines=(late,))))
        assert "late: 2024-05-31, due 2024-06-01 07:00 UTC" in run("show", "daily").output
        assert run("list").exit_code == 1
        assert "Deleted daily." in run("delete", "daily").output
        assert "There is no schedule 'daily'" in str(run("show", "daily").exception)
        refused = str(run("set", "daily", "--cron", "0 25 * * *").exception)
        assert "cron: '0 25 * * *' has an invalid hour. For example: 0 6 * * *" in refused
