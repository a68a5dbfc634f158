"""``GET /quarantine``: refused files, their reasons and their keys."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from services.api.quarantine.service import RECORDS_SHOWN_MAX
from shared.domain import objects
from shared.domain.objects import QuarantineReport
from tests.fakes.api import DAY, Client, World, report_of, write_report


def test_refused_file_has_its_reason_and_bad_records(world: World, client: Client) -> None:
    """A file has the reason of its refusal, its first bad records, its key and its report's key; no credentials."""
    write_report(world, report_of("7"))
    response = client.get(f"/quarantine?from={DAY}&to={DAY}")
    assert response.status_code == 200
    (file,) = response.json()["files"]
    assert (file["city_id"], file["records"], file["bad_records"]) == ("7", 20, 12)
    assert len(file["reported"]) == RECORDS_SHOWN_MAX
    assert file["reported"][0] == {
        "record_number": 1,
        "byte_offset": 100,
        "field": "passengers",
        "value": "-1",
        "reason": "bad",
    }
    assert file["report_key"] == "quarantine/date=2024-05-01/city=7/a.error.json"
    assert file["upstream_url"] == "http://upstream.test/cities/7/stats?date=2024-05-01"
    assert file["reason"].startswith("record 1")


def test_full_detail_has_all_reported_records(world: World, client: Client) -> None:
    """A file with ``detail=full`` has every bad record of its report, and the headers of the upstream."""
    write_report(world, report_of("7"))
    (file,) = client.get("/quarantine?city=7&detail=full").json()["files"]
    assert (len(file["reported"]), file["etag"], file["last_modified"]) == (12, '"v1"', None)


def test_a_retry_without_a_file_is_not_found(client: Client) -> None:
    """The response of a retry that matches no file is 404, and says where files are listed."""
    response = client.post("/quarantine/retry?city=7")
    assert (response.status_code, "GET /quarantine lists them" in response.json()["detail"]) == (404, True)


def test_only_files_of_the_range_are_listed(world: World, client: Client) -> None:
    """Only files of the range are listed, by date, up to the limit, with their number."""
    dates = [DAY + dt.timedelta(days=days) for days in (-1, 0, 30, 31, 40)]
    for date in reversed(dates):
        write_report(world, report_of("7", date))
    response = client.get(f"/quarantine?from={dates[1]}&to={dates[3]}&limit=2").json()
    assert (response["total"], [file["date"] for file in response["files"]]) == (3, [str(dates[1]), str(dates[2])])


def test_report_deleted_after_its_listing_is_left_out(world: World, client: Client) -> None:
    """A report that is deleted between listing and reading is left out."""
    report = report_of("7")
    world.store.write(report.report_key, objects.encode(report))
    get = world.store.get

    async def gone(key: str, *, first_bytes: int | None = None) -> None:
        world.store.objects.pop(key)
        assert await get(key, first_bytes=first_bytes) is None

    world.store.get = gone  # type: ignore[method-assign]  # a store whose object goes between two calls
    assert client.get(f"/quarantine?from={DAY}&to={DAY}").json()["files"] == []


@pytest.mark.parametrize(
    "query",
    [
        "from=2024-05-01",
        "to=2024-05-01",
        "from=2024-05-02&to=2024-05-01",
        "from=2020-01-01&to=2024-05-01",
        "from=x&to=y",
    ],
)
def test_invalid_range_is_refused(client: Client, query: str) -> None:
    """Dates that are missing, reversed, too many or invalid are refused as for the statistics."""
    assert client.get(f"/quarantine?{query}").status_code == 400


def test_a_decoded_report_equals_the_stored_one() -> None:
    """A report comes back from its bytes as it was."""
    report = msgspec.structs.replace(report_of("7"), broke_off="cut", records=None)
    assert objects.decode(QuarantineReport, objects.encode(report), "a report") == report
