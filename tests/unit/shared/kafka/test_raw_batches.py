"""Batches of bytes, decoded record by record: as aiokafka decodes them, and around what it cannot decode."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from hypothesis import given
from hypothesis import strategies as st

from shared.kafka.dead_letters import CUT_HEADER
from shared.kafka.raw_batches import Undecodable, first_batch

PARTITION = TopicPartition("city-stats", 2)
NONE, GZIP, LZ4, ZSTD = 0, 1, 3, 4
CONTROL = 0x20
LOG_APPEND_TIME = 0x08

parts = st.none() | st.binary(max_size=300)
headers = st.lists(st.tuples(st.text(max_size=5), parts), max_size=3)


def batch_of(*records: tuple[Any, ...], first: int = 0, codec: int = NONE) -> bytearray:
    """Return a batch of keys, values and headers; record n has the timestamp 1,000 + n."""
    builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 2**20)
    for number, (key, value, named) in enumerate(records):
        builder.append(number, 1_000 + number, key, value, named)
    return sealed(builder.build(), first=first)


def sealed(batch: bytearray, *, first: int = 0, attributes: int = 0) -> bytearray:
    """Set the first offset and attributes of a batch, and correct its checksum."""
    struct.pack_into(">q", batch, 0, first)
    batch[22] |= attributes
    struct.pack_into(">I", batch, 17, calc_crc32c(bytes(batch[21:])))
    return batch


def places(batch: bytearray, offset: int) -> list[tuple[int, bool]]:
    """Return the offset of each record from an offset on, and whether it was decoded."""
    found = first_batch(bytes(batch), PARTITION, offset)
    assert found is not None
    return [(one.record.offset, False) if isinstance(one, Undecodable) else (one.offset, True) for one in found.records]


@given(st.lists(st.tuples(parts, parts, headers), min_size=1, max_size=5), st.sampled_from((NONE, GZIP, ZSTD)))
def test_records_are_decoded_as_aiokafka_decodes_them(records: list[Any], codec: int) -> None:
    """Keys, values, headers, offsets and timestamps are the same, in each codec."""
    batch = batch_of(*records, first=7, codec=codec)
    found = first_batch(bytes(batch), PARTITION, 0)
    assert found is not None
    expected = [
        (one.offset, one.timestamp, one.key, one.value, tuple(one.headers)) for one in DefaultRecordBatch(bytes(batch))
    ]
    decoded = [one for one in found.records if isinstance(one, ConsumerRecord)]
    assert [(one.offset, one.timestamp, one.key, one.value, one.headers) for one in decoded] == expected
    assert {(one.topic, one.partition) for one in decoded} == {PARTITION}
    assert found.next_offset == 7 + len(records)


def test_the_batch_of_an_offset_is_found() -> None:
    """A response begins with the batch that has the offset, and may end within a batch."""
    record: tuple[Any, ...] = (b"k", b"v", [])
    data = bytes(batch_of(record, record) + batch_of(record, record, first=2) + batch_of(record, first=9))
    for offset, begin in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 9), (9, 9)):
        found = first_batch(data, PARTITION, offset)
        assert found is not None
        assert isinstance(found.records[0], ConsumerRecord)
        assert found.records[0].offset == begin
    for nothing in (
        first_batch(data, PARTITION, 10),
        first_batch(data[:-1], PARTITION, 5),
        first_batch(b"", PARTITION, 0),
    ):
        assert nothing is None


def test_a_timestamp_of_the_broker_counts() -> None:
    """If the broker gives the time, all records of a batch have the time of their append."""
    batch = sealed(batch_of((b"k", b"v", []), (b"k", b"v", [])), attributes=LOG_APPEND_TIME)
    found = first_batch(bytes(batch), PARTITION, 0)
    assert found is not None
    assert [one.timestamp for one in found.records if isinstance(one, ConsumerRecord)] == [1_001, 1_001]


def test_control_records_are_no_records() -> None:
    """The end of a transaction has offsets that no consumer gets."""
    batch = sealed(batch_of((b"k", b"v", [])), attributes=CONTROL)
    found = first_batch(bytes(batch), PARTITION, 0)
    assert found is not None
    assert (found.records, found.next_offset) == ([], 1)


def test_a_header_that_is_not_utf_8_leaves_the_rest_of_its_record() -> None:
    """The key and the value are known, and the name is written with backslashes."""
    batch = batch_of((b"0", b"0", []), (b"key", b"value", [("abc", b"x"), ("good", None)]), (b"2", b"2", []))
    batch = sealed(batch.replace(b"abc", b"a\xffc"))
    assert places(batch, 0) == [(0, True), (1, False), (2, True)]
    found = first_batch(bytes(batch), PARTITION, 1)
    assert found is not None
    bad = found.records[0]
    assert isinstance(bad, Undecodable)
    assert (bad.record.key, bad.record.value, bad.record.timestamp) == (b"key", b"value", 1_001)
    assert bad.record.headers == (("a\\xffc", b"x"), ("good", None))
    assert (bad.why, bad.place) == ("the name of a header is not UTF-8: a\\xffc", "partition 2, offset 1")


@pytest.mark.parametrize("damage", ["checksum", "compression", "version"])
def test_a_batch_that_cannot_be_decoded_is_one_bad_record(damage: str) -> None:
    """It has all offsets that are left of the batch, and the bytes of the batch as its value."""
    batch = batch_of(*[(b"k", b"v" * 100, [])] * 3, first=5, codec=GZIP if damage == "compression" else NONE)
    if damage == "checksum":
        batch[-1] ^= 1
    elif damage == "compression":
        batch[65:80] = b"\0" * 15
        batch = sealed(batch, first=5)
    else:
        batch[16] = 1
    found = first_batch(bytes(batch), PARTITION, 5)
    assert found is not None
    (bad,) = found.records
    assert isinstance(bad, Undecodable)
    assert bad.record.value == bytes(batch)
    assert bad.record.headers == ((CUT_HEADER, str(len(batch)).encode()),)
    assert bad.record.offset == 5
    assert found.next_offset == bad.next_offset == (6 if damage == "version" else 8)


@given(st.binary(max_size=60), st.integers(0, 80))
def test_no_bytes_crash_the_decoder(damage: bytes, at: int) -> None:
    """Whatever stands in a batch whose checksum is right, each offset is decoded, or known to be bad."""
    batch = batch_of(*[(b"key", b"value", [("name", b"x")])] * 3)
    body = 61 + at % (len(batch) - 61)
    batch[body : body + len(damage)] = damage[: len(batch) - body]
    found = first_batch(bytes(sealed(batch)), PARTITION, 0)
    assert found is not None
    ends = [one.next_offset if isinstance(one, Undecodable) else one.offset + 1 for one in found.records]
    assert ends == sorted(ends)
    assert max(ends, default=0) <= found.next_offset == 3
