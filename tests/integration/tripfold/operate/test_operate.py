"""The operator's commands as an operator runs them, against a stack whose services go on meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from prometheus_client.parser import text_string_to_metric_families

from shared.domain import keys, objects
from shared.domain.contribution import NOTHING
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Manifest, Summary
from shared.domain.topics import Topic
from shared.runtime.settings import Settings
from shared.storage.change_index import ChangeCounter
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectNotFound
from shared.storage.s3 import S3Store
from tests.fakes.bucket import DAY
from tests.integration.commands import run_json, tripfold
from tests.integration.conftest import isolated_settings
from tests.integration.running import Running, eventually, running
from tests.integration.trips import OTHER_DATE, TRIPS
from tests.integration.upstream import UpstreamServer
from tests.prometheus import run_tool
from tripfold.local.embedded import EmbeddedServices

TROUBLESOME = "[/bold] \x9b31m \u202e"
"""A name that could end the markup of a table, colour a terminal, or reverse its lines."""


async def summary_of(services: Running, country: str) -> tuple[str, Summary]:
    """Return the key and the content of a live summary of the day."""
    key = keys.summary((await read_current(services.store)).live, DAY, CountrySlug(country))
    found = await services.store.get(key)
    assert found is not None
    return key, objects.decode(Summary, found.body, key)


async def damage(services: Running, country: str) -> None:
    """Write a live summary with totals that are not its ledger's, and count it, so that the API serves it."""
    key, summary = await summary_of(services, country)
    await services.store.put(key, objects.encode(msgspec.structs.replace(summary, totals=NOTHING)))
    live = (await read_current(services.store)).live
    await ChangeCounter(services.store).count(live, [keys.month_of(DAY)])


async def damage_entry(services: Running, country: str) -> None:
    """Write a live summary whose cities have other contributions than their manifests."""
    key, summary = await summary_of(services, country)
    ledger = {city: msgspec.structs.replace(entry, contribution=NOTHING) for city, entry in summary.ledger.items()}
    await services.store.put(key, objects.encode(msgspec.structs.replace(summary, ledger=ledger)))


async def test_operator_commands_work_beside_running_services(embedded: EmbeddedServices, tmp_path: Any) -> None:
    """Verify, repair, rebuild from both sides, drop, clean up and examine, on a stack of running services."""
    with UpstreamServer() as upstream:
        for city, country in ((1, "Armenia"), (2, "Armenia"), (3, "Brasil")):
            upstream.add_city(city, f"City {city} {TROUBLESOME}", country)
            upstream.put(city, str(DAY), TRIPS[: city * 10])
            upstream.put(city, OTHER_DATE, TRIPS[:5])
        settings = isolated_settings(embedded, UPSTREAM_URL=upstream.url)
        async with running(settings, tmp_path) as services:
            assert (await services.process(str(DAY)))["status"] == "completed"
            right = await services.stats(str(DAY))
            await _verify_and_repair(services, right, tmp_path / "verify.prom")
            await _rebuild(services, upstream, right)
            await _clean_up(services)
            code, found = await run_json(services.settings, "doctor")
            assert (code, [one for one in found if not one["ok"]]) == (0, [])


def gauges_of(metrics_file: Path) -> dict[tuple[str, str], float]:
    """Return the values in a file of metrics, by the name after ``tripfold_verify_`` and the check."""
    text = metrics_file.read_text()
    run_tool("promtool", "check", "metrics", text=text)
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return {(one.name.removeprefix("tripfold_verify_"), one.labels["check"]): one.value for one in samples}


async def _verify_and_repair(services: Running, right: dict[str, Any], metrics_file: Path) -> None:
    code, verified = await run_json(services.settings, "verify", "--deep", "--metrics-file", str(metrics_file))
    gauges = gauges_of(metrics_file)
    assert (gauges["compared", "deep"], gauges["differences", "deep"]) == (2, 0)
    nothing_wrong = {"dates": 1, "country_days": 2, "raw_expired": 0, "differences_total": 0, "differences": []}
    assert (code, verified) == (0, nothing_wrong)
    await damage(services, "armenia")
    of_day = ("--from", str(DAY), "--to", str(DAY), "--metrics-file", str(metrics_file))
    code, verified = await run_json(services.settings, "verify", *of_day)
    assert code == 1
    later = gauges_of(metrics_file)
    assert later["differences", "summaries"] == 1
    assert later["timestamp_seconds", "summaries"] > gauges["timestamp_seconds", "deep"]
    assert [(one["country"], one["what"]) for one in verified["differences"]] == [("armenia", "totals")]
    assert await services.stats(str(DAY)) != right
    code, repaired = await run_json(services.settings, "repair")
    assert (code, [one["country"] for one in repaired["country_days"]]) == (0, ["armenia"])
    assert await services.stats(str(DAY)) == right
    await damage_entry(services, "brasil")
    for command, code_expected, expected in (
        ("verify", 1, "Differences: 1, in 2 country-days"),
        ("repair", 0, "Summaries repaired: 1; refused: 0"),
    ):
        code, out, err = await tripfold(services.settings, command)
        assert (code, expected in err) == (code_expected, True), out + err
        assert [shown in out for shown in ("[/bold]", "\\x9b31m", "\\u202e")] == [True] * 3
    assert await services.stats(str(DAY)) == right


async def _rebuild(services: Running, upstream: UpstreamServer, right: dict[str, Any]) -> None:
    await damage(services, "armenia")
    code, rebuilt = await run_json(services.settings, "rebuild", "--from", "kafka", "--dry-run")
    assert (code, rebuilt["flipped"], [one["country"] for one in rebuilt["changes"]]) == (0, False, ["armenia"])
    code, out, err = await tripfold(services.settings, "rebuild", "--from", "s3", "--dry-run")
    assert (code, "Traceback" in err) == (0, False), err
    told_of = ("live", "built", "equal ledgers, but totals", "1 of them differ from generation 1", "Dry run")
    assert [told for told in told_of if told not in out + err] == []
    assert await services.stats(str(DAY)) != right
    code, rebuilt = await run_json(services.settings, "rebuild", "--from", "kafka")
    assert (code, rebuilt["flipped"], rebuilt["generation"]) == (0, True, 4)
    assert await services.stats(str(DAY)) == right
    code, rebuilt = await run_json(services.settings, "rebuild", "--from", "s3")
    assert (code, rebuilt["flipped"], rebuilt["changes"]) == (0, True, [])
    assert await services.stats(str(DAY)) == right
    upstream.put(1, str(DAY), TRIPS)
    assert (await services.process(str(DAY)))["status"] == "completed"
    assert (await services.process(OTHER_DATE))["status"] == "completed"
    assert (await services.stats(str(DAY)))["armenia"][str(DAY)]["bus_count"] == 70
    code, activated = await run_json(services.settings, "generations", "activate", "1")
    assert (code, activated["flipped"], activated["generation"]) == (0, True, 6)
    assert (await services.stats(str(DAY)))["armenia"][str(DAY)]["bus_count"] == 70
    code, out, _ = await tripfold(services.settings, "generations", "list")
    assert (code, [word in out for word in ("live", "old")]) == (0, [True, True])
    code, out, err = await tripfold(services.settings, "generations", "drop", "1", "--grace-s", "0")
    assert (code, "2 summaries" in out) == (0, True), err
    code, verified = await run_json(services.settings, "verify", "--deep")
    assert (code, verified["country_days"]) == (0, 4)


async def _clean_up(services: Running) -> None:
    city = CityId("1")
    orphan, unfinished = keys.raw(DAY, city, "orphan"), keys.raw(DAY, city, "unfinished")
    await services.store.put(orphan, b"[]")
    upload = services.store.upload(unfinished)
    for _ in range(3):
        await upload.write(bytes(5 * 1024 * 1024))
    code, _, err = await tripfold(services.settings, "gc", "--older-than", "30m")
    assert (code, "must exceed the deadline" in err) == (1, True)
    quick = services.settings.model_copy(update={"ingest_deadline_s": 0.05})

    async def both_gone() -> bool | None:
        code, _ = await run_json(quick, "gc", "--older-than", "2s")
        assert code == 0
        left = [one async for one in services.store.unfinished_uploads(keys.RAW)]
        return True if not left and await services.store.get(orphan) is None else None

    await eventually(both_gone, "the orphan and the unfinished upload to go")
    await upload.abort()
    found = await services.store.get(keys.manifest(DAY, city))
    assert found is not None
    manifest = objects.decode(Manifest, found.body, "a manifest")
    for key in (manifest.raw_key, *(past.raw_key for past in manifest.history)):
        assert await services.store.get(key) is not None


async def test_a_topic_with_other_settings_is_named_with_its_remedy(settings: Settings) -> None:
    """A topic that was made by hand is left as it is by apply; apply and check say how to set it, and exit 1."""
    name = f"{settings.topic_prefix}{Topic.CITY_STATS.value}"
    client = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    by_hand = NewTopic(name, num_partitions=1, replication_factor=1, config={"cleanup.policy": "delete"})
    await asyncio.to_thread(client.create_topics([by_hand])[name].result)
    code, out, err = await tripfold(settings, "topics", "check")
    assert (code, "'tripfold topics apply' creates the missing topics" in err) == (1, True), out + err
    remedy = f"--entity-name {name} --add-config cleanup.policy=compact,retention.ms=-1,"
    for command in ("apply", "check"):
        code, out, err = await tripfold(settings, "topics", command)
        assert (code, remedy in err, "'tripfold topics apply'" in err) == (1, True, False), out + err


async def test_a_new_bucket_is_created_once(settings: Settings) -> None:
    """The first command says that it created the bucket; the next one, that the bucket exists."""
    name = settings.s3_bucket
    said = [(await tripfold(settings, "bucket", "apply"))[1].strip() for _ in range(2)]
    assert said == [f"Created the bucket {name}.", f"The bucket {name} exists."]


async def test_doctor_does_not_create_a_missing_bucket(settings: Settings) -> None:
    """The doctor names a missing bucket, and leaves nothing behind that would look like one."""
    for _ in range(2):
        code, found = await run_json(settings, "doctor")
        by_name = {one["what"]: one for one in found}
        assert (code, by_name["S3"]["ok"], by_name["revisions"]["ok"]) == (1, False, False)
        assert by_name["compare-and-swap"]["found"] == "not checked without S3"


async def test_the_admin_store_streams_objects_and_knows_the_time_of_the_store(embedded: EmbeddedServices) -> None:
    """A large object comes whole in chunks, a missing one is reported, and the store's clock is close to ours."""
    async with S3Store(isolated_settings(embedded)) as store:
        await store.create_bucket()
        body = bytes(range(256)) * 20_000
        await store.put("raw/large.json", body)
        chunks = [chunk async for chunk in store.stream("raw/large.json")]
        assert len(chunks) > 1
        assert hashlib.sha256(b"".join(chunks)).digest() == hashlib.sha256(body).digest()
        with pytest.raises(ObjectNotFound):
            [chunk async for chunk in store.stream("raw/missing.json")]
        assert abs((await store.now()).timestamp() - time.time()) < 60
        await store.delete("raw/large.json")
        await store.delete("raw/large.json")
        assert [one async for one in store.list("raw/")] == []
