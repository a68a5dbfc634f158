"""The objects and events of released versions, kept as fixtures; also the program of ``make released``.

    python -m tests.released

It runs the services, processes dates with every kind of outcome, and keeps one object and one event of each kind under
``tests/fixtures/released/VERSION``. Record the version that is developed. Never change a version that was released.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec

from services.aggregate.replay.topic_reader import KafkaTopicReader
from services.api.requests.idempotency import Claim
from shared.domain import events, keys, objects
from shared.domain.events import EVENT_TYPES
from shared.domain.objects import BucketObject, SummaryHead
from shared.domain.tables import TableRecord
from shared.runtime.settings import Settings
from shared.storage.repository import Repository
from shared.storage.s3 import S3Store
from tests import ROOT
from tests.integration.commands import tripfold
from tests.integration.conftest import isolated_settings
from tests.integration.running import Running, eventually, running
from tests.integration.trips import make_trips
from tests.integration.upstream import UpstreamServer
from tripfold.local.embedded import embedded_services

FOLDER = ROOT / "tests" / "fixtures" / "released"
KINDS: dict[str, type[BucketObject]] = {
    keys.BUCKET_EPOCH: objects.BucketEpoch,
    keys.SCHEMA_SWITCH: objects.SchemaSwitch,
    keys.COUNTRIES: objects.Countries,
    keys.CURRENT: objects.GenerationPointer,
    keys.CHANGES: objects.ChangeCounters,
    keys.ACTIVE_REQUESTS: objects.ActiveRequests,
    keys.OPEN_BACKFILLS: objects.OpenBackfills,
    keys.BACKFILLS: objects.Backfill,
    keys.SCHEDULES: objects.Schedule,
    keys.REQUESTS: objects.RequestRecord,
    keys.PLANS: objects.Plan,
    keys.MANIFESTS: objects.Manifest,
    keys.SUMMARIES: objects.Summary,
    keys.QUARANTINE: objects.QuarantineReport,
    keys.ATTEMPTS: objects.AttemptsUnderWay,
    keys.TABLES: TableRecord,
    "idempotency/": Claim,
}
"""The kind of an object by its key or the prefix of its key."""
DATES = ("2024-05-01", "2024-05-02", "2024-05-03")
EXPIRE_AFTER_S = 6


class ReleasedObject(msgspec.Struct, frozen=True, kw_only=True):
    """A kept object: its kind, the key that it had, and its bytes."""

    kind: str
    key: str
    body: bytes


class ReleasedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A kept event: its kind, and the topic, key, type header and value of its record."""

    kind: str
    topic: str
    key: str
    ce_type: str
    value: bytes


def released_objects() -> Iterator[tuple[str, ReleasedObject]]:
    """Yield the kept objects, each with its version."""
    for index in sorted(FOLDER.glob("*/objects.json")):
        for kind, key in json.loads(index.read_text()).items():
            body = (index.parent / "objects" / f"{kind}.json").read_bytes()
            yield index.parent.name, ReleasedObject(kind=kind, key=key, body=body)


def released_events() -> Iterator[tuple[str, ReleasedEvent]]:
    """Yield the kept events, each with its version."""
    for index in sorted(FOLDER.glob("*/events.json")):
        for kind, record in json.loads(index.read_text()).items():
            value = (index.parent / "events" / f"{kind}.json").read_bytes()
            yield index.parent.name, ReleasedEvent(kind=kind, value=value, **record)


def object_kinds() -> dict[str, type[BucketObject]]:
    """Return every kind of object that is stored by its name."""
    return {kind.__name__: kind for kind in BucketObject.__subclasses__() if kind is not SummaryHead}


def event_kinds() -> set[str]:
    """Return the name of every kind of event."""
    return {kind.__name__ for kinds in EVENT_TYPES.values() for kind in kinds}


def kind_of(key: str) -> type[BucketObject] | None:
    """Return the kind of the object under a key, or None if it is not recorded."""
    return next((kind for prefix, kind in KINDS.items() if key.startswith(prefix)), None)


async def record(settings: Settings, upstream: UpstreamServer, folder: Path) -> None:
    """Process dates with every outcome, and write one object and one event of each kind into a folder."""
    code, _, err = await tripfold(settings, "bucket", "apply")
    assert code == 0, err
    with tempfile.TemporaryDirectory() as logs:
        async with running(settings, Path(logs)) as services:
            kept: dict[str, ReleasedObject] = {}
            async with _keeping(services.store, kept):
                await _process(services, upstream)
            code, _, err = await tripfold(settings, "lake", "build")
            assert code == 0, err
            await asyncio.sleep(EXPIRE_AFTER_S)
            code, _, err = await tripfold(settings, "expire", "raw", "--older-than", f"{EXPIRE_AFTER_S}s")
            assert code == 0, err
            await _keep(services.store, kept)
    recorded = await _events(settings)
    _write(folder, kept, recorded)
    missing = (object_kinds().keys() - kept.keys()) | (event_kinds() - recorded.keys())
    assert not missing, f"the run made no {', '.join(sorted(missing))}"


async def _process(services: Running, upstream: UpstreamServer) -> None:
    """Make every kind of object and event: a refused file, a retry, a move, a range, a failed request."""
    first, second, third = DATES
    for number, date in enumerate(DATES):
        for city in (1, 2, 3):
            upstream.put(city, date, make_trips(10 * number + city, 2_000, date))
    upstream.add_city(1, "Port Tina", "Armenia")
    upstream.add_city(2, "Kitamori", "Armenia")
    upstream.add_city(3, "São Brás", "Brasil")
    upstream.cities.append({"id": "", "name": "bad"})
    upstream.put(2, first, [*make_trips(2, 40, first), {**make_trips(2, 1, first)[0], "passengers": -1}])
    upstream.pace_s = 1.0  # slow enough to report progress
    request = await services.process(first)
    assert request["status"] == "completed with failures", request
    upstream.pace_s = 0.0
    retried = await services.client.post(f"/process-requests/{request['id']}/retry")
    assert retried.status_code == 202, retried.text
    await services.ended(f"/process-requests/{request['id']}")
    upstream.put(2, first, make_trips(2, 50, first))
    upstream.add_city(3, "São Brás", "Armenia")
    await services.process(first)
    answer = await services.client.post(
        "/process-request", params={"from": first, "to": second}, headers={"Idempotency-Key": "released"}
    )
    assert answer.status_code == 202, answer.text
    await services.ended(answer.headers["location"])
    answer = await services.client.put("/schedules/daily", params={"cron": "* * * * *", "complete_by": "09:00"})
    assert answer.status_code == 200, answer.text
    await eventually(lambda: _run_of(services.store, "daily"), "a run of the schedule", deadline_s=150)
    upstream.cities = [{"id": ""}]
    assert (await services.process(third))["status"] == "failed"


async def _run_of(store: S3Store, name: str) -> objects.ScheduledRun | None:
    schedule = await Repository(store).get(objects.Schedule, keys.schedule(name))
    return schedule.run if schedule else None


@contextlib.asynccontextmanager
async def _keeping(store: S3Store, kept: dict[str, ReleasedObject]) -> AsyncIterator[None]:
    """Keep objects during the block too: some are deleted later."""

    async def keep_on() -> None:
        while True:
            await _keep(store, kept)
            await asyncio.sleep(0.2)

    task = asyncio.create_task(keep_on())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await _keep(store, kept)


async def _keep(store: S3Store, kept: dict[str, ReleasedObject]) -> None:
    """Keep the longest object of each kind: it has the most fields."""
    async for listed in store.list(""):
        kind = kind_of(listed.key)
        known = kept.get(kind.__name__) if kind else None
        if kind is None or (known is not None and len(known.body) >= listed.size_bytes):
            continue
        found = await store.get(listed.key)
        if found is not None:
            kept[kind.__name__] = ReleasedObject(kind=kind.__name__, key=listed.key, body=found.body)


async def _events(settings: Settings) -> dict[str, ReleasedEvent]:
    """Return the longest event of each kind."""
    kept: dict[str, ReleasedEvent] = {}
    for topic in EVENT_TYPES:
        replay = KafkaTopicReader(settings, topic)
        try:
            await replay.take_end()
            async for batch in replay.read():
                for one in batch:
                    value, kind = one.value or b"", type(events.decode(topic, one.value)).__name__
                    if kind not in kept or len(value) > len(kept[kind].value):
                        kept[kind] = ReleasedEvent(
                            kind=kind,
                            topic=topic.value,
                            key=(one.key or b"").decode(),
                            ce_type=dict(one.headers)["ce_type"].decode(),
                            value=value,
                        )
        finally:
            await replay.close()
    return kept


def _write(folder: Path, kept: dict[str, ReleasedObject], recorded: dict[str, ReleasedEvent]) -> None:
    for name in ("objects", "events"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for old in (folder / name).iterdir():
            old.unlink()
    for kind, stored in kept.items():
        (folder / "objects" / f"{kind}.json").write_bytes(stored.body)
    for kind, event in recorded.items():
        (folder / "events" / f"{kind}.json").write_bytes(event.value)
    named = {kind: kept[kind].key for kind in sorted(kept)}
    (folder / "objects.json").write_text(json.dumps(named, indent=2) + "\n")
    of_events = {
        kind: {"topic": event.topic, "key": event.key, "ce_type": event.ce_type}
        for kind, event in sorted(recorded.items())
    }
    (folder / "events.json").write_text(json.dumps(of_events, indent=2) + "\n")


def main() -> None:
    """Record the version that is developed."""
    folder = FOLDER / version("tripfold")
    with (
        tempfile.TemporaryDirectory() as data,
        embedded_services(Path(data)) as embedded,
        UpstreamServer(etags=True) as upstream,
    ):
        os.environ |= {"AWS_ACCESS_KEY_ID": embedded.access_key, "AWS_SECRET_ACCESS_KEY": embedded.secret_key}
        changes = {"UPSTREAM_URL": upstream.url, "INGEST_DEADLINE_S": str(EXPIRE_AFTER_S - 1)}
        asyncio.run(record(isolated_settings(embedded, **changes), upstream, folder))
    print(f"{folder.relative_to(ROOT)} is recorded")  # noqa: T201 - a program prints its result


if __name__ == "__main__":
    main()
