"""A record whose handling fails again and again in the same way goes to the dead letters. An outage never does that."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence

import pytest

from services.aggregate.consumer import CityStatsConsumer
from shared.domain import keys
from shared.domain.events import NewerContract
from shared.domain.ids import CountrySlug
from shared.domain.objects import CorruptObject, NewerObject
from shared.domain.topics import Topic
from shared.kafka.dead_letters import ERROR_HEADER
from shared.kafka.isolation import SAME_FAULTS_MAX, IsolatingBatch
from shared.kafka.producer import KafkaUnavailable
from shared.kafka.records import ConsumedRecord
from shared.storage.object_store import CasConflict, StoreUnavailable
from tests.fakes.bucket import DAY, FakeBucket, trips
from tests.fakes.log import MemoryLog, MemoryPublisher

SUMMARY = keys.summary(1, DAY, CountrySlug("armenia"))


class Handler:
    """Handles records, but those of some offsets."""

    def __init__(self, *bad: int, error: Callable[[int], Exception] = lambda _: TypeError("no")) -> None:
        self.log = MemoryLog()
        self.handled: list[int] = []
        self._bad = bad
        self._error = error

    def batch(self, size: int) -> IsolatingBatch:
        records = [
            ConsumedRecord(topic=Topic.CITY_STATS, partition=0, offset=offset, key=b"%d" % offset, value=b"")
            for offset in range(size)
        ]
        return IsolatingBatch(records, self._process, MemoryPublisher(self.log))

    async def _process(self, batch: Sequence[ConsumedRecord]) -> None:
        for record in batch:
            if record.offset in self._bad:
                raise self._error(record.offset)
            self.handled.append(record.offset)

    @property
    def dead_letters(self) -> dict[int, str]:
        """The errors of the dead letters, by offset."""
        letters = self.log.records(Topic.DEAD_LETTERS)
        return {int(one.key or b""): dict(one.headers)[ERROR_HEADER].decode() for one in letters}


async def errors_of(batch: IsolatingBatch, *, tries: int) -> list[Exception]:
    """Try to handle a batch until it succeeds; return the errors."""
    errors: list[Exception] = []
    while len(errors) < tries:
        try:
            await batch.handle()
        except Exception as error:  # noqa: BLE001  # as the retrier does
            errors.append(error)
        else:
            break
    return errors


@pytest.mark.parametrize("bad", [(0,), (6,), (2, 3), (0, 6)])
async def test_the_records_that_fail_in_one_way_are_isolated_and_the_others_handled(bad: tuple[int, ...]) -> None:
    """The dead letters have the error, and all other records are handled."""
    handler = Handler(*bad)
    assert len(await errors_of(handler.batch(7), tries=99)) <= 2 * SAME_FAULTS_MAX
    assert handler.dead_letters == dict.fromkeys(
        bad, f"handling it failed {SAME_FAULTS_MAX} times in the same way: TypeError: no"
    )
    assert set(handler.handled) == set(range(7)) - set(bad)


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
async def test_an_outage_isolates_nothing(error: Exception) -> None:
    """However often an error of a dependency, or of an object that all records need, is repeated: it is raised."""
    handler = Handler(1, error=lambda _: error)
    assert len(await errors_of(handler.batch(3), tries=100)) == 100
    assert handler.dead_letters == {}


async def test_an_error_that_changes_isolates_nothing() -> None:
    """Only equal errors in a row show that trying again does not help."""
    messages = iter(range(1_000))
    handler = Handler(1, error=lambda _: ValueError(next(messages)))
    assert len(await errors_of(handler.batch(3), tries=100)) == 100
    assert handler.dead_letters == {}


async def test_an_outage_in_between_delays_the_isolation() -> None:
    """Errors of an outage between the equal ones, also while the batch is halved, are raised."""
    faults: list[Exception] = [
        *[TypeError("no")] * 3,
        KafkaUnavailable("down"),
        *[TypeError("no")] * 6,
        StoreUnavailable("down"),
    ]
    handler = Handler(1, error=lambda _: faults.pop(0) if faults else TypeError("no"))
    await errors_of(handler.batch(3), tries=99)
    assert list(handler.dead_letters) == [1]
    assert set(handler.handled) == {0, 2}


async def test_records_that_fail_in_two_ways_are_all_isolated() -> None:
    """A handler may work in any order, so the fault of a later record can hide that of an earlier one."""
    handler = Handler(1, 5, error=TypeError)
    backwards = handler._process

    async def process(batch: Sequence[ConsumedRecord]) -> None:
        await backwards(batch[::-1])

    handler._process = process  # type: ignore[method-assign]
    assert len(await errors_of(handler.batch(7), tries=99)) <= 2 * SAME_FAULTS_MAX
    assert set(handler.dead_letters) == {1, 5}
    assert set(handler.handled) == {0, 2, 3, 4, 6}


async def test_a_handler_that_handles_nothing_loses_one_record_at_a_time() -> None:
    """If each record fails, the handler is at fault: the records are not all sent to the dead letters at once."""
    handler = Handler(*range(50))
    assert len(await errors_of(handler.batch(50), tries=3 * SAME_FAULTS_MAX)) == 3 * SAME_FAULTS_MAX
    assert set(handler.dead_letters) == {0, 1, 2}


async def test_a_summary_that_cannot_be_read_stops_its_own_country_day_alone() -> None:
    """The aggregate folds the other country-days of the batch. The records of this one wait in the dead letters."""
    bucket = FakeBucket()
    events = [*bucket.plan(1, {"armenia": [1], "brasil": [2]}), *bucket.store_file(2, 12, trips(2), "brasil")]
    bucket.store.write(SUMMARY, b'{"totals":{"trips":' + b"9" * 400 + b"}}")
    consumer = CityStatsConsumer(bucket.store, bucket.publisher, cache_bytes=100_000)
    batch = IsolatingBatch([bucket.record_of(event) for event in events], consumer.process, bucket.publisher)
    errors = await errors_of(batch, tries=99)
    assert {type(error) for error in errors} == {CorruptObject}
    letters = bucket.log.records(Topic.DEAD_LETTERS)
    assert [letter.key for letter in letters] == [f"{DAY}/armenia".encode()]
    assert (await bucket.summary("brasil")).complete
