"""A key whose records cannot be handled is set aside, and the others go on. An outage never sets a key aside."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence

import pytest

from services.aggregate.consumer import CityStatsConsumer
from shared.domain import keys
from shared.domain.events import NewerContract
from shared.domain.ids import CountrySlug, utc_now
from shared.domain.objects import CorruptObject, NewerObject, Summary
from shared.domain.topics import Topic
from shared.kafka.dead_letters import ERROR_HEADER
from shared.kafka.failed_keys import SAME_FAULTS_MAX, FailedKeys, KeyResult, for_each, harms_one_key
from shared.kafka.producer import KafkaUnavailable
from shared.kafka.records import ConsumedRecord
from shared.runtime.health import Health
from shared.storage.object_store import CasConflict, StoreUnavailable
from tests.fakes.bucket import DAY, FakeBucket, trips
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.metrics import value
from tests.fakes.store import MemoryStore

SUMMARY = keys.summary(1, DAY, CountrySlug("armenia"))
UNREADABLE = CorruptObject(SUMMARY, "is not a readable Summary", Summary)


class Handler:
    """Handles records by their key, but those of some keys."""

    def __init__(self, *bad: str, error: Callable[[str], Exception] = lambda _: TypeError("no")) -> None:
        self.log, self.store, self.health = MemoryLog(), MemoryStore(utc_now), Health()
        self.health.started = True
        self.failed = FailedKeys(Topic.CITY_STATS, MemoryPublisher(self.log), self.health, self.store)
        self.handled: list[int] = []
        self.bad = set(bad)
        self.error = error
        self._taken = 0

    async def handle(self, record_keys: str, *, tries: int = 99) -> int:
        """Handle a batch with a record for each letter, the record's key. Return how often it was tried."""
        first, self._taken = self._taken, self._taken + len(record_keys)
        left = [
            ConsumedRecord(topic=Topic.CITY_STATS, partition=0, offset=offset, key=key.encode(), value=b"")
            for offset, key in enumerate(record_keys, first)
        ]
        for tried in range(1, tries + 1):
            try:
                await self.failed.handle(self._process, left)
            except Exception:  # noqa: BLE001  # as the retrier does
                continue
            return tried
        return tries

    async def _process(self, batch: Sequence[ConsumedRecord]) -> list[KeyResult]:
        results = []
        for key in dict.fromkeys((record.key or b"").decode() for record in batch):
            records = [record for record in batch if record.key == key.encode()]
            error = self.error(key) if key in self.bad else None
            if error is not None and not harms_one_key(error):
                raise error
            self.handled += [] if error else [record.offset for record in records]
            results.append(KeyResult(key, records, error))
        return results

    @property
    def dead_letters(self) -> str:
        """The keys of the dead letters, in order."""
        return "".join((one.key or b"").decode() for one in self.log.records(Topic.DEAD_LETTERS))

    @property
    def set_aside(self) -> int:
        """How many keys the metric says."""
        return int(value("tripfold_failed_keys", topic="city-stats"))


async def test_an_unreadable_object_sets_its_key_aside_at_once() -> None:
    """However many records the key has, there is no second try. The service stays ready, and health has the reason."""
    handler = Handler("a", error=lambda _: UNREADABLE)
    assert await handler.handle("abab" * 200) == 1
    assert (handler.dead_letters, len(handler.handled)) == ("a" * 400, 400)
    assert await handler.handle("ab") == 1
    assert (handler.health.ready, handler.set_aside) == (True, 1)
    assert handler.health.faults == {"key a of city-stats": f"its records go to the dead letters: {UNREADABLE}"}
    letter = handler.log.records(Topic.DEAD_LETTERS)[0]
    assert dict(letter.headers)[ERROR_HEADER].decode() == str(UNREADABLE)


async def test_a_key_that_fails_again_and_again_is_set_aside_and_its_later_records_at_once() -> None:
    """The other keys are handled once. Later records of the key are tried once, also if the message differs."""
    handler = Handler("a")
    assert await handler.handle("abca") == SAME_FAULTS_MAX
    assert (handler.dead_letters, handler.handled) == ("aa", [1, 2])
    handler.error = lambda _: TypeError("another one")
    assert await handler.handle("aa") == 1
    assert (handler.dead_letters, handler.set_aside) == ("aaaa", 1)


async def test_a_key_that_is_handled_is_no_longer_set_aside() -> None:
    """Health and metric forget it, and a later failure is tried again."""
    handler = Handler("a")
    await handler.handle("ab")
    handler.bad = set()
    await handler.handle("a")
    assert (handler.health.faults, handler.set_aside) == ({}, 0)
    handler.bad = {"a"}
    assert await handler.handle("ab") == SAME_FAULTS_MAX


@pytest.mark.parametrize("body", [None, b"", b"{}"], ids=["removed", "damaged", "of another kind"])
async def test_a_key_is_shown_until_its_object_can_be_read_again(body: bytes | None) -> None:
    """`repair` removes an object or writes it anew. An object that is still unreadable stays visible."""
    handler = Handler("a", error=lambda _: UNREADABLE)
    await handler.handle("a")
    if body is not None:
        handler.store.write(SUMMARY, body)
    await handler.failed.look_again()
    assert handler.set_aside == (0 if body is None else 1)


@pytest.mark.parametrize(
    "error",
    [
        KafkaUnavailable("Kafka is down"),
        StoreUnavailable("S3 is down"),
        NewerContract(Topic.CITY_STATS, "city-day-stats", 2),
        NewerObject(SUMMARY, "has schema version 2"),
        CorruptObject(keys.CURRENT, "is not readable"),
        CorruptObject(keys.BUCKET_EPOCH, "is not readable"),
        CasConflict(SUMMARY),
        ConnectionResetError("reset"),
        TimeoutError(),
        ssl.SSLCertVerificationError("expired"),
        RuntimeError("cannot schedule new futures after shutdown"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_outage_sets_no_key_aside(error: Exception) -> None:
    """However often an error of a dependency, or of an object that all keys need, is repeated: it is raised."""
    handler = Handler("b", error=lambda _: error)
    assert await handler.handle("abc", tries=100) == 100
    assert handler.dead_letters == ""


async def test_an_error_that_changes_sets_no_key_aside() -> None:
    """Only equal errors in a row show that trying again does not help."""
    messages = iter(range(1_000))
    handler = Handler("b", error=lambda _: ValueError(next(messages)))
    assert await handler.handle("abc", tries=100) == 100
    assert handler.dead_letters == ""


async def test_keys_that_fail_in_two_ways_are_set_aside_together() -> None:
    """Each key has its own error, and no key waits for another one."""
    handler = Handler("a", "c", error=TypeError)
    assert await handler.handle("abc") == SAME_FAULTS_MAX
    assert (handler.dead_letters, handler.handled) == ("ac", [1])


async def test_a_handler_that_handles_nothing_loses_one_key_at_a_time() -> None:
    """If each key fails, the handler is at fault: the records are not all sent to the dead letters at once."""
    handler = Handler(*"abcdefgh")
    assert await handler.handle("abcdefgh", tries=SAME_FAULTS_MAX) == SAME_FAULTS_MAX  # this process has just begun
    assert handler.dead_letters == "a"
    await handler.handle("abcdefgh", tries=2 * SAME_FAULTS_MAX)
    assert len(set(handler.dead_letters)) == 3


async def test_one_item_that_fails_keeps_no_other_from_its_turn() -> None:
    """Its error is raised in the end. An outage is raised at once."""
    done: list[int] = []

    async def work(item: int) -> None:
        if item == 0:
            raise KeyError(item)
        if item == 3:
            raise StoreUnavailable("away")
        done.append(item)

    with pytest.raises(KeyError):
        await for_each(work, [0, 1, 2])
    with pytest.raises(StoreUnavailable):
        await for_each(work, [3, 4])
    assert done == [1, 2]


async def test_a_summary_that_cannot_be_read_stops_its_own_country_day_alone() -> None:
    """The aggregate folds the other country-days of the batch. The records of this one wait in the dead letters."""
    bucket = FakeBucket()
    events = [*bucket.plan(1, {"armenia": [1], "brasil": [2]}), *bucket.store_file(2, 12, trips(2), "brasil")]
    bucket.store.write(SUMMARY, b'{"totals":{"trips":' + b"9" * 400 + b"}}")
    consumer = CityStatsConsumer(bucket.store, bucket.publisher, cache_bytes=100_000)
    failed = FailedKeys(Topic.CITY_STATS, bucket.publisher, Health(), bucket.store)
    await failed.handle(consumer.process, [bucket.record_of(event) for event in events])
    letters = bucket.log.records(Topic.DEAD_LETTERS)
    assert [letter.key for letter in letters] == [f"{DAY}/armenia".encode()]
    assert (await bucket.summary("brasil")).complete
