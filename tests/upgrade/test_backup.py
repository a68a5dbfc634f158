"""Backup and restore of bucket and topics: the commands of docs/how-to/back-up-and-restore.md, as they are written.

Only the commands of AWS are replaced: the test copies the objects itself.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.aggregate.replay.topic_reader import KafkaTopicReader
from shared.domain import events
from shared.domain.events import CountryDaySummary, Event
from shared.domain.topics import Topic
from shared.runtime.concurrency import bounded_map
from shared.runtime.settings import Settings
from shared.storage.s3 import S3Store
from tests import ROOT
from tests.integration.commands import tripfold
from tests.integration.conftest import isolated_settings
from tests.integration.running import running
from tests.integration.trips import figures_of, make_trips
from tests.integration.upstream import UpstreamServer
from tripfold.local.embedded import EmbeddedServices
from tripfold.operate.topic_records import revision_of

PAGE = ROOT / "docs" / "how-to" / "back-up-and-restore.md"
FIRST, SECOND, AFTERWARDS = "2024-05-01", "2024-05-02", "2024-05-03"
COUNTRIES = {1: "Armenia", 2: "Armenia", 3: "Brasil"}


def commands_of(section: str) -> list[list[str]]:
    """Return the commands of a section of the page, in order."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in re.findall(r"^ *\$ (.*)$", text, re.MULTILINE)]


class Installation:
    """The bucket, its backup and the topics."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    async def run(self, command: list[str], *, allowed: tuple[int, ...] = (0,)) -> None:
        """Run a command of the page."""
        match command:
            case ["aws", "s3", "mb", url]:
                async with self._bucket(url) as store:
                    await store.create_bucket()
            case ["aws", "s3", "sync", source, target]:
                async with self._bucket(source) as one, self._bucket(target) as other:
                    await other.create_bucket()
                    await _copy(one, other)
            case ["tripfold", *arguments]:
                code, out, err = await tripfold(self.settings, *arguments)
                assert code in allowed, (arguments, out, err)
            case _:
                raise AssertionError(f"the test does not know the command {command}")

    def _bucket(self, url: str) -> S3Store:
        name = url.replace("s3://tripfold", self.settings.s3_bucket)
        return S3Store(self.settings.model_copy(update={"s3_bucket": name}))

    async def lose_the_bucket(self) -> None:
        """Delete every object."""
        async with S3Store(self.settings) as store:
            await bounded_map(store.delete, [one.key async for one in store.list("")], limit=16)
            assert [one async for one in store.list("")] == []

    def lose_kafka(self) -> None:
        """Go on with a Kafka that has no topics and no offsets: other prefixes of an empty cluster's names."""
        self.settings = self.settings.model_copy(update={"topic_prefix": f"new-{self.settings.topic_prefix}"})


async def _copy(source: S3Store, target: S3Store) -> None:
    for key in [one.key async for one in source.list("")]:
        found = await source.get(key)
        assert found is not None
        await target.put(key, found.body)


class Consumer:
    """A consumer downstream: it keeps the record of the highest revision of each key, also of lost topics."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Topic, str], tuple[int, Event]] = {}

    async def read(self, settings: Settings) -> None:
        """Read the compacted topics from the beginning."""
        for topic in (Topic.CITY_STATS, Topic.COUNTRY_DAY_SUMMARIES):
            replay = KafkaTopicReader(settings, topic)
            try:
                await replay.take_end()
                async for batch in replay.read():
                    for record in batch:
                        self._keep(topic, events.decode(topic, record.value))
            finally:
                await replay.close()

    def _keep(self, topic: Topic, event: Event) -> None:
        revision = event.version if isinstance(event, CountryDaySummary) else revision_of(event)
        known = self.kept.get((topic, event.key))
        if known is None or known[0] < revision:
            self.kept[topic, event.key] = (revision, event)


@pytest.fixture
def upstream() -> Iterator[UpstreamServer]:
    """Serve three cities on three dates."""
    with UpstreamServer(etags=True) as server:
        for city, country in COUNTRIES.items():
            server.add_city(city, f"City {city}", country)
            for number, date in enumerate((FIRST, SECOND, AFTERWARDS)):
                server.put(city, date, make_trips(10 * number + city, 40, date))
        yield server


@pytest.mark.parametrize("section", ["Put a backup of the bucket back", "The bucket and Kafka are lost"])
async def test_a_lost_bucket_is_restored(
    section: str, embedded: EmbeddedServices, upstream: UpstreamServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the page's commands every number is exact, and consumers end with what the bucket holds.

    After the backup, a file was corrected and another date was processed. A consumer knows both.
    """
    settings = isolated_settings(embedded, UPSTREAM_URL=upstream.url)
    installation, consumer = Installation(settings), Consumer()
    corrected = make_trips(99, 60, FIRST)
    async with running(settings, tmp_path) as services:
        for date in (FIRST, SECOND):
            assert (await services.process(date))["status"] == "completed"
        for command in commands_of("Back up"):
            await installation.run(command)
        upstream.put(1, FIRST, corrected)
        for date in (FIRST, AFTERWARDS):
            assert (await services.process(date))["status"] == "completed"
    await consumer.read(settings)
    before = dict(consumer.kept)
    await installation.lose_the_bucket()
    kafka_lost = "Kafka" in section
    if kafka_lost:
        installation.lose_kafka()
    commands = commands_of(section)
    starts = next(number for number, command in enumerate(commands) if command[1] == "restore") + 1 + kafka_lost
    for command in commands[:starts]:
        # Without the loss of Kafka, the topic knows the date that was processed after the backup.
        await installation.run(command, allowed=(1,) if command[1] == "restore" and not kafka_lost else (0,))
    async with running(installation.settings, tmp_path) as services:
        monkeypatch.setenv("TRIPFOLD_API_URL", str(services.client.base_url))
        for command in commands[starts:]:
            await installation.run(command)
        stats = await services.stats(FIRST, AFTERWARDS)
        assert stats["armenia"][FIRST] == figures_of(corrected, make_trips(2, 40, FIRST))
        assert stats["brasil"] == {
            date: figures_of(make_trips(10 * number + 3, 40, date))
            for number, date in enumerate((FIRST, SECOND, AFTERWARDS))
        }
    fresh = Consumer()
    for one in (consumer, fresh):
        await one.read(installation.settings)
    assert consumer.kept == fresh.kept, "a consumer that knew later numbers ends with what the bucket holds"
    changed = [key for key in before if key[1].startswith((AFTERWARDS, f"{FIRST}/armenia/1"))]
    assert len(changed) == 8
    assert all(consumer.kept[key][0] > before[key][0] for key in changed)
