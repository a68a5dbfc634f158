"""The commands for files in quarantine, over the API."""

from __future__ import annotations

import json

import msgspec
from typer.testing import CliRunner, Result

from shared.domain import keys, objects
from shared.domain.objects import RequestRecord
from tests.fakes.api import DAY, World, record_of_failure, report_of, write, write_report
from tests.serving import served
from tripfold import cli


def test_refused_files_are_listed_shown_and_retried() -> None:
    """Each command needs the API alone. A pipe gets one line for each file; JSON has every field."""
    world = World()
    failed = record_of_failure("7", "Port Tina", "refused")
    write(world, failed)
    write_report(world, msgspec.structs.replace(report_of("7"), last_request_id=failed.request_id))
    runner = CliRunner()
    with served(world) as url:

        def run(*arguments: str) -> Result:
            return runner.invoke(cli.app, ["quarantine", *arguments, "--api", url])

        listed = run("list", "--from", str(DAY), "--to", str(DAY), "--country", "armenia").output
        (line,) = (line for line in listed.splitlines() if line.startswith(f"{DAY}\t"))
        assert line.split("\t")[:6] == [str(DAY), "armenia", "7", "Port Tina", "200", "12"]
        assert "1 file in quarantine" in listed
        assert "0 files in quarantine" in run("list", "--country", "peru").output
        shown = run("show", str(DAY), "7").output
        assert "bad records  12 of 20" in shown
        assert 'validators  "v1"' in shown
        assert shown.count("\tpassengers\t-1\tbad") == 12
        printed = run("show", str(DAY), "7", "--json").output
        assert json.loads(printed[printed.index("\n{\n") :])["sha256"] == "aa"
        assert "no file of city '8'" in str(run("show", str(DAY), "8").exception)
        retried = run("retry", str(DAY), "7").output
        assert f"Retrying {DAY}, city 7 (Port Tina) in request {failed.request_id}." in retried
        assert "no such file" in str(run("retry", str(DAY), "8").exception)
        assert run("retry").exit_code == 2
    key = keys.request(failed.request_id)
    assert objects.decode(RequestRecord, world.store.objects[key].body, key).retry is not None


def test_reports_that_cannot_be_read_are_named() -> None:
    """A list and a retry lack them, and say so."""
    world = World()
    write_report(world, report_of("7"))
    damaged = f"{keys.quarantine_of_date(DAY)}city=8/a{keys.REPORT_SUFFIX}"
    world.store.write(damaged, b"{")
    with served(world) as url:
        for command in (["list"], ["list", "--json"], ["retry", str(DAY)]):
            output = CliRunner().invoke(cli.app, ["quarantine", *command, "--api", url]).output
            assert f"Left out: {damaged} " in output
            assert "Select fewer" not in output
