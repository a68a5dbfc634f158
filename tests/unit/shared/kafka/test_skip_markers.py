"""Skip markers: they apply to the record that an operator has seen, and to no other."""

from __future__ import annotations

import msgspec
import pytest

from shared.domain import events, keys
from shared.domain.events import NewerContract
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.kafka.skip_markers import SkipMarkers, is_marked, mark
from tests.fakes.bucket import NOON
from tests.fakes.builders import STATS
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.store import MemoryStore
from tripfold.operate.skip import CannotSkip, refuse_harmless

NEWER = ConsumedRecord(
    topic=Topic.CITY_STATS,
    partition=3,
    offset=17,
    key=b"2024-05-01/peru/7",
    value=b'{"type":"forecast","schema_version":2}',
    timestamp_ms=1_714_000_000_000,
)
GOOD = msgspec.structs.replace(NEWER, offset=18, value=events.encode(STATS))


@pytest.fixture(name="store")
def _store() -> MemoryStore:
    return MemoryStore(lambda: NOON)


async def test_a_marked_record_goes_to_the_dead_letters(store: MemoryStore) -> None:
    """A batch continues without the marked record; without a marker it stays blocked."""
    log = MemoryLog()
    skip_markers = SkipMarkers(store, MemoryPublisher(log))
    error = NewerContract(Topic.CITY_STATS, "forecast", 2, partition=3, offset=17)
    with pytest.raises(NewerContract):
        await skip_markers.take(error, [NEWER, GOOD])
    await mark(store, NEWER, NOON)
    assert list(store.objects) == ["state/skips/city-stats/3/17.json"]
    assert await skip_markers.take(error, [NEWER, GOOD]) == [GOOD]
    (letter,) = log.records(Topic.DEAD_LETTERS)
    assert letter.value == NEWER.value
    assert b"skipped by an operator" in dict(letter.headers)["tripfold_error"]


@pytest.mark.parametrize("changes", [{"value": b'{"type":"x","schema_version":2}'}, {"timestamp_ms": 1}])
async def test_a_marker_does_not_outlive_its_topic(store: MemoryStore, changes: dict[str, object]) -> None:
    """Another record at the same offset, as after the topic was made again, is not skipped; it can be marked anew."""
    await mark(store, NEWER, NOON)
    other = msgspec.structs.replace(NEWER, **changes)
    assert not await is_marked(store, other)
    await mark(store, other, NOON)
    assert await is_marked(store, other)


async def test_an_unreadable_marker_skips_nothing(store: MemoryStore) -> None:
    """A damaged marker leaves the consumer blocked rather than skipping a record by guess."""
    store.write(keys.skip("city-stats", 3, 17), b"{")
    assert not await is_marked(store, NEWER)


@pytest.mark.parametrize("value", [GOOD.value, b'{"type":"unknown-thing","schema_version":1}'])
def test_a_record_that_blocks_no_consumer_is_not_marked(value: bytes) -> None:
    """A record that this build reads, or sends to the dead letters anyway, needs no skip."""
    with pytest.raises(CannotSkip, match="blocks no consumer"):
        refuse_harmless(msgspec.structs.replace(NEWER, value=value))
    refuse_harmless(NEWER)
