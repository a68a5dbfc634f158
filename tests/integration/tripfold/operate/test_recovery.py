"""Failures and the operator's repairs: bad files, files that crash the worker, requests and dead letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from services.aggregate.replay.topic_reader import KafkaTopicReader
from shared.domain import keys
from shared.domain.ids import CityId
from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import ConsumedRecord
from shared.runtime.settings import Settings
from tests.integration.commands import run_json, tripfold
from tests.integration.conftest import isolated_settings
from tests.integration.faults import FAULT, crash_at_poison
from tests.integration.running import Running, eventually, running
from tests.integration.trips import figures_of, make_trips
from tests.integration.upstream import UpstreamServer
from tripfold.local.embedded import EmbeddedServices

DATE = "2024-05-01"
POISON_RECORD = b"\x1b[31mnot an event \xff"
HEADERS = (("who", b"me"),)


async def test_failures_are_found_and_corrected(embedded: EmbeddedServices, tmp_path: Path) -> None:
    """A bad file and one that crashes the worker are quarantined; a command processes each after its correction."""
    trips = {city: make_trips(city, 40, DATE) for city in (1, 2, 3)}
    with UpstreamServer() as upstream:
        for city, file in trips.items():
            upstream.add_city(city, f"City {city}", "Armenia")
            upstream.put(city, DATE, file)
        upstream.put(2, DATE, [*trips[2], {**trips[2][0], "passengers": -1}])
        upstream.put(3, DATE, [*trips[3], {**trips[3][0], "bus-type": "POISON"}])
        settings = isolated_settings(embedded, UPSTREAM_URL=upstream.url)
        crashing = {"worker": {FAULT: crash_at_poison.__name__}}
        async with running(settings, tmp_path, own=crashing) as services:
            request = await services.process(DATE)
            assert request["status"] == "completed with failures"
            assert await services.stats(DATE) == {"armenia": {DATE: figures_of(trips[1])}}
            await _found_in_quarantine(services, request, upstream)
            upstream.put(2, DATE, trips[2])
            upstream.put(3, DATE, trips[3])
            await _retried(services, request)
            assert await services.stats(DATE) == {"armenia": {DATE: figures_of(*trips.values())}}


async def _found_in_quarantine(services: Running, request: dict[str, Any], upstream: UpstreamServer) -> None:
    failures = {failure["city_id"]: failure for failure in request["failures"]}
    assert failures.keys() == {"2", "3"}
    assert "record 41" in failures["2"]["reason"]
    assert "3 processes crashed, one after the other, while each parsed this file alone" in failures["3"]["reason"]
    for city, failure in failures.items():
        found = await services.store.get(failure["quarantine_key"])
        assert found is not None
        assert found.body == upstream.files[city, DATE]
    quarantine = ("quarantine", "list", *api_of(services))
    code, listed = await run_json(services.settings, *quarantine, "--from", DATE, "--to", DATE, "--country", "armenia")
    assert (code, [one["key"] for one in listed]) == (0, [failures[city]["quarantine_key"] for city in ("2", "3")])
    code, out, _ = await tripfold(services.settings, *quarantine)
    assert (code, out.count(DATE)) == (0, 2), "what 'quarantine show' is to be given is not cut short"
    code, shown = await run_json(services.settings, "quarantine", "show", DATE, "2", *api_of(services))
    assert (code, shown["bad_records"], shown["records"]) == (0, 1, 41)
    assert (shown["reported"][0]["field"], shown["reported"][0]["value"]) == ("passengers", "-1")
    files = (await services.client.get("/quarantine", params={"from": DATE, "to": DATE})).json()
    assert (files["total"], [file["city_id"] for file in files["files"]]) == (2, ["2", "3"])
    assert await services.store.get(keys.manifest(request_date(request), CityId("2"))) is None


def api_of(services: Running) -> tuple[str, str]:
    """Return the option that names the API."""
    return "--api", str(services.client.base_url)


def request_date(request: dict[str, Any]) -> Any:
    """Return the date of a request."""
    return keys.parse_date(f"/date={request['date']}/")


async def _retried(services: Running, request: dict[str, Any]) -> None:
    where = f"/process-requests/{request['id']}"
    code, retried = await run_json(services.settings, "quarantine", "retry", DATE, "2", *api_of(services))
    city = {"date": DATE, "city_id": "2", "city_name": "City 2", "request_id": request["id"]}
    assert (code, retried) == (0, {"retried": [city], "skipped": [], "unreadable": []})

    async def failed(count: int) -> bool | None:
        counts = (await services.client.get(where)).json()["counts"]
        return True if (counts["cities_failed"], counts["cities_done"]) == (count, 3) else None

    await eventually(lambda: failed(1), "the city that was put right to be served")
    code, out, _ = await tripfold(services.settings, "requests", "show", request["id"])
    assert (code, "raw/" in out, f"tripfold retry {request['id']}" in out) == (0, True, True)
    code, _, _ = await tripfold(services.settings, "retry", request["id"], "--no-watch", *api_of(services))
    assert code == 0
    await eventually(lambda: failed(0), "the last city to be served")
    assert (await services.client.get(where)).json()["status"] == "completed"
    code, listed = await run_json(services.settings, "requests", "list", "--limit", "5")
    assert (code, [(one["id"], one["status"]) for one in listed]) == (0, [(request["id"], "completed")])
    code, out, _ = await tripfold(services.settings, "requests", "list")
    assert (code, request["id"] in out) == (0, True), "what 'requests show' is to be given is not cut short"
    code, retried = await run_json(services.settings, "quarantine", "retry", DATE, *api_of(services))
    assert (code, retried["retried"], len(retried["skipped"])) == (0, [], 2)


async def test_dead_letters_are_found_and_sent_back(settings: Settings) -> None:
    """A dead letter is listed, shown safely on the terminal, sent back unchanged, marked, and not sent twice."""
    await apply_topics(settings)
    record = ConsumedRecord(
        topic=Topic.PROCESS_REQUESTS, partition=2, offset=7, key=b"2024-05-01", value=POISON_RECORD, headers=HEADERS
    )
    async with KafkaPublisher(settings, source="test") as publisher:
        await publisher.send_to_dead_letters(record, "JSON is malformed")
    code, out, err = await tripfold(settings, "dead-letters", "list", "--topic", "process-requests", "--json")
    assert code == 0, err
    (letter,) = msgspec.json.decode(out)["letters"]
    assert (letter["origin_partition"], letter["origin_offset"], letter["retried_at"]) == ("2", "7", None)
    assert (letter["key"], letter["headers"], letter["error"]) == ("2024-05-01", [["who", "me"]], "JSON is malformed")
    code, out, _ = await tripfold(settings, "dead-letters", "show", letter["id"])
    assert (code, "\x1b[31mnot" in out, "\\x1b[31mnot an event" in out) == (0, False, True)
    code, out, err = await tripfold(settings, "dead-letters", "retry", letter["id"])
    assert (code, "back to process-requests" in out) == (0, True), err
    code, _, err = await tripfold(settings, "dead-letters", "retry", letter["id"])
    assert (code, "already sent back" in err) == (1, True)
    replay = KafkaTopicReader(settings, Topic.PROCESS_REQUESTS)
    assert await replay.take_end() == 1
    (sent,) = [record async for batch in replay.read() for record in batch]
    await replay.close()
    assert (sent.key, sent.value) == (record.key, record.value)
    assert sent.headers == (*HEADERS, ("tripfold_retried_from", f"dead-letters/{letter['id']}".encode()))
