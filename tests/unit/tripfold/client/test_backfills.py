"""The commands for backfills, against the API."""

from __future__ import annotations

import datetime as dt

import httpx
import msgspec
import pytest
from tripfold_client import Backfill as BackfillState
from typer.testing import CliRunner, Result

from shared.domain import keys, objects
from shared.domain.backfills import DateEnd, concluded, with_end
from shared.domain.events import Background, Source
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import Backfill, DateSelection
from tests.fakes.api import World
from tests.serving import served
from tests.unit.tripfold.client import id_in
from tripfold import cli
from tripfold.client.watching import progress_of


def test_backfills_are_made_watched_and_changed() -> None:
    """Each command prints what happened and the next command; a failed date is exit 1 and names its request."""
    world = World()
    runner = CliRunner()
    with served(world) as url:

        def run(*arguments: str) -> Result:
            return runner.invoke(cli.app, [*arguments, "--api", url])

        previewed = run("backfill", "2024-05-01..2024-05-03", "--dry-run", "--newest-first").output
        assert next(line for line in previewed.splitlines() if line.startswith("2024")) == "2024-05-03"
        assert "3 of 3 dates would be processed." in previewed
        made = run("backfill", "2024-05-01..2024-05-03", "--no-watch", "--max-parallel", "3")
        backfill_id = RequestId(id_in(made.output))
        assert backfill_id in run("backfills", "list").output
        assert "Resume it: 'tripfold backfills resume" in run("backfills", "pause", backfill_id).output
        assert "2024-05-01..2024-05-03, paused" in run("backfills", "show", backfill_id).output
        assert run("backfills", "resume", backfill_id).exit_code == 0
        assert "2024-05-01..2024-05-03, running" in run("backfills", "show", backfill_id).output

        key = keys.backfill(backfill_id)
        backfill = objects.decode(Backfill, world.store.objects[key].body, key)
        for position, end in enumerate((DateEnd.FAILED, DateEnd.COMPLETED, DateEnd.COMPLETED)):
            backfill = with_end(backfill, position, end)
        ended = msgspec.structs.replace(concluded(backfill), version=9)
        world.store.write(key, objects.encode(ended))
        watched = run("watch", backfill_id)
        assert watched.exit_code == 1
        assert "3/3 dates 1 failed completed with failures" in watched.output
        assert "2024-05-01 failed. See why: 'tripfold watch" in watched.output
        assert run("retry", backfill_id, "--no-watch").exit_code == 0
        assert run("cancel", backfill_id).exit_code == 0
        assert f"{backfill_id}: 2024-05-01..2024-05-03, cancelled" in run("backfills", "show", backfill_id).output
        assert "there is no backfill" in str(run("backfills", "show", "none").exception).lower()


def test_reprocess_is_a_backfill_of_stored_files() -> None:
    """It processes the dates that are stored, in the background, and names the chosen country and city."""
    world = World()
    with served(world) as url:
        given = ["--source", "bucket", "--country", "armenia", "--city", "7", "--api", url]
        arguments = ["backfill", "2024-05-01..2024-05-03", *given]
        previewed = CliRunner().invoke(cli.app, [*arguments, "--dry-run"])
        made = CliRunner().invoke(cli.app, [*arguments, "--no-watch"])
        bare = CliRunner().invoke(cli.app, ["backfill", "2024-05-01..2024-05-03", "--city", "7", "--api", url])
        range_of_dates = CliRunner().invoke(cli.app, ["request", "2024-05-01..2024-05-03", "--api", url])
        refused = httpx.post(f"{url}/backfills?from=2024-05-01&to=2024-05-01&country=armenia")
    assert "0 of 3 dates would be processed." in previewed.output
    assert (bare.exit_code, range_of_dates.exit_code) == (2, 2)
    key = keys.backfill(RequestId(id_in(made.output)))
    backfill = objects.decode(Backfill, world.store.objects[key].body, key)
    wanted = Background(source=Source.BUCKET, country=CountrySlug("armenia"), city_id=CityId("7"))
    assert (backfill.background, backfill.selection) == (wanted, DateSelection.STORED)
    assert (refused.status_code, "use bucket" in refused.text) == (400, True)


def test_a_reprocessing_that_finds_no_file_fails_and_names_what_it_looked_for() -> None:
    """All dates are skipped if the city is unknown: the command says so and exits with 1."""
    world = World()
    with served(world) as url:
        given = ["--source", "bucket", "--city", "no[such]", "--no-watch", "--api", url]
        arguments = ["backfill", "2024-05-01..2024-05-02", *given]
        backfill_id = RequestId(id_in(CliRunner().invoke(cli.app, arguments).output))
        key = keys.backfill(backfill_id)
        backfill = objects.decode(Backfill, world.store.objects[key].body, key)
        for position in range(2):
            backfill = with_end(backfill, position, DateEnd.SKIPPED)
        world.store.write(key, objects.encode(msgspec.structs.replace(concluded(backfill), version=9)))
        watched = CliRunner().invoke(cli.app, ["watch", backfill_id, "--api", url])
    assert "No date from 2024-05-01 to 2024-05-02 has stored files of city 'no[such]'." in watched.output
    assert watched.exit_code == 1


@pytest.mark.parametrize(
    ("rate", "end", "line"),
    [
        (None, None, "0/3 dates paused"),
        (90.0, dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC), "0/3 dates paused 90/h until about 2024-05-02 10:00 UTC"),
    ],
)
def test_progress_is_one_line(rate: float | None, end: dt.datetime | None, line: str) -> None:
    """The line has the dates done, the status unless it runs, the speed, and the estimated end."""
    counts = dict.fromkeys(("dates_completed", "dates_failed", "dates_skipped", "dates_cancelled"), 0)
    state = msgspec.convert(
        {
            "id": "1",
            "from": "2024-05-01",
            "to": "2024-05-03",
            "only": "all",
            "order": "oldest-first",
            "max_parallel": 2,
            "source": "upstream",
            "country": None,
            "city": None,
            "schedule": None,
            "status": "paused",
            "version": 1,
            "created_at": "2024-05-01T00:00:00Z",
            "updated_at": "2024-05-01T00:00:00Z",
            "counts": {**counts, "dates_total": 3, "dates_under_way": 0},
            "dates_per_hour": rate,
            "estimated_end": end,
        },
        BackfillState,
    )
    assert progress_of(state) == line
