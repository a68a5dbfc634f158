"""Reads one batch of a partition as bytes, and decodes its records one by one.

aiokafka decodes a batch from its first record on. If a header's name is not UTF-8, aiokafka raises at this record each
time. Then it cannot return any later record of this batch, wherever the consumer seeks to. The functions of this module
return the records on both sides, and of the bad record enough for its dead letter.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import msgspec
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.codec import gzip_decode, lz4_decode, snappy_decode, zstd_decode
from aiokafka.errors import (
    LeaderNotAvailableError,
    NoError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.util import decode_varint

from shared.domain.topics import DEAD_LETTER_BYTES_MAX
from shared.kafka.connection import connection
from shared.kafka.dead_letters import CUT_HEADER
from shared.runtime.settings import Settings

REQUEST_TIMEOUT_MS = 20_000
SHOWN_NAME_LENGTH_MAX = 100

_START = struct.Struct(">qi4xb")  # the first offset, the length of what follows it, and the format's version
_LENGTH_END = 12
_LAST_DELTA = struct.Struct(">23xi")  # the distance from the first offset to the last
_COUNT = struct.Struct(">57xi")  # the number of records
_RECORDS_BEGIN = 61
_VERSION = 2
_UNCOMPRESSED: dict[int, Callable[[bytes], bytes]] = {
    DefaultRecordBatch.CODEC_NONE: bytes,
    DefaultRecordBatch.CODEC_GZIP: gzip_decode,
    DefaultRecordBatch.CODEC_SNAPPY: snappy_decode,
    DefaultRecordBatch.CODEC_LZ4: lz4_decode,
    DefaultRecordBatch.CODEC_ZSTD: zstd_decode,
}


class Undecodable(msgspec.Struct, frozen=True):
    """A record that the Kafka client cannot decode, and why. The next record has ``next_offset``.

    ``record`` has its key and value if they can be read. Otherwise the value is the bytes of the record, or of the
    batch if none of it can be decoded. The header CUT_HEADER says so.
    """

    record: ConsumerRecord[bytes, bytes]
    why: str
    next_offset: int

    @property
    def place(self) -> str:
        """The partition and the offsets, in words."""
        first, last = self.record.offset, self.next_offset - 1
        offsets = f"offset {first}" if first == last else f"offsets {first} to {last}"
        return f"partition {self.record.partition}, {offsets}"


class RawBatch(msgspec.Struct, frozen=True):
    """The records of a batch from some offset on, in order. The next batch begins at ``next_offset``."""

    records: list[ConsumerRecord[bytes, bytes] | Undecodable]
    next_offset: int


async def read_batch(settings: Settings, partition: TopicPartition, offset: int) -> RawBatch | None:
    """Read the batch of an offset, or the first batch after it. None: there is none yet.

    Raises OffsetOutOfRangeError, and the other KafkaErrors and OSErrors of a failed request.
    """
    client = AIOKafkaClient(**connection(settings), request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        await client.bootstrap()
        leader = (await client.fetch_all_metadata()).leader_for_partition(partition)
        if leader is None:
            raise UnknownTopicOrPartitionError(partition)
        if leader == -1:
            raise LeaderNotAvailableError(partition)
        wanted = [(partition.topic, [(partition.partition, offset, DEAD_LETTER_BYTES_MAX)])]
        response = await client.send(leader, FetchRequest(0, 0, DEAD_LETTER_BYTES_MAX, 0, wanted))
    finally:
        await client.close()
    ((_, ((_, error_code, _, *_, data),)),) = response.topics
    error = for_code(error_code)
    if error is not NoError:
        raise error(partition)
    return first_batch(data or b"", partition, offset)


def first_batch(data: bytes, partition: TopicPartition, offset: int) -> RawBatch | None:
    """Decode the first batch that has ``offset`` or later offsets, if ``data`` has a whole one."""
    begin = 0
    while begin + _RECORDS_BEGIN <= len(data):
        first, length, version = _START.unpack_from(data, begin)
        end = begin + _LENGTH_END + length
        if length <= 0 or end > len(data):
            return None
        raw = data[begin:end]
        last = first + (_LAST_DELTA.unpack_from(raw)[0] if version == _VERSION else 0)
        if last >= offset:
            return _decode(raw, partition, max(first, offset), last + 1)
        begin = end
    return None


def _decode(raw: bytes, partition: TopicPartition, offset: int, next_offset: int) -> RawBatch:
    """Return the records of a batch from ``offset`` on."""
    try:
        batch = DefaultRecordBatch(raw)
        if batch.magic != _VERSION:
            raise ValueError(f"its batch has version {batch.magic}")  # noqa: TRY301  # as the errors of the codecs
        if not batch.validate_crc():
            raise ValueError("the checksum of its batch is wrong")  # noqa: TRY301
        if batch.is_control_batch:
            return RawBatch([], next_offset)
        body = bytearray(_UNCOMPRESSED[batch.compression_type](raw[_RECORDS_BEGIN:]))
    except Exception as error:  # noqa: BLE001  # the codecs raise errors of any kind
        return RawBatch([Undecodable(_unknown(partition, offset, raw), _reason(error), next_offset)], next_offset)
    records: list[ConsumerRecord[bytes, bytes] | Undecodable] = []
    begin = 0
    for _ in range(_COUNT.unpack_from(raw)[0]):
        try:
            length, begin = decode_varint(body, begin)
            end = begin + length
            since_first_ms, at = decode_varint(body, begin + 1)
            delta, at = decode_varint(body, at)
            if length <= 0 or end > len(body) or batch.base_offset + delta >= next_offset:
                raise ValueError(f"its length is {length}, and its offset {delta} from the first")  # noqa: TRY301
        except (ValueError, IndexError) as error:  # nothing shows where the next record begins
            known = _unknown(partition, offset, bytes(body[begin:]))
            records.append(Undecodable(known, _reason(error), next_offset))
            break
        at_ms = batch.max_timestamp if batch.timestamp_type else batch.first_timestamp + since_first_ms
        if batch.base_offset + delta >= offset:
            offset = batch.base_offset + delta
            records.append(_decode_record(body[at:end], partition, offset, at_ms))
            offset += 1
        begin = end
    return RawBatch(records, next_offset)


def _decode_record(
    body: bytearray, partition: TopicPartition, offset: int, timestamp_ms: int
) -> ConsumerRecord[bytes, bytes] | Undecodable:
    """Decode the key, the value and the headers of a record."""
    key = value = None
    headers: list[tuple[str, bytes | None]] = []
    why = ""
    try:
        key, at = _bytes(body, 0)
        value, at = _bytes(body, at)
        count, at = decode_varint(body, at)
        for _ in range(count):
            name, at = _bytes(body, at)
            header, at = _bytes(body, at)
            headers.append(((name or b"").decode(errors="backslashreplace"), header))
            if name is None or headers[-1][0].encode() != name:
                why = f"the name of a header is not UTF-8: {headers[-1][0][:SHOWN_NAME_LENGTH_MAX]}"
        if count < 0 or at != len(body):
            raise ValueError("its length is wrong")  # noqa: TRY301  # as the errors of the numbers
    except (ValueError, IndexError) as error:
        return Undecodable(_unknown(partition, offset, bytes(body)), _reason(error), offset + 1)
    record = _consumer_record(partition, offset, timestamp_ms=timestamp_ms, key=key, value=value, headers=headers)
    return Undecodable(record, why, offset + 1) if why else record


def _bytes(body: bytearray, at: int) -> tuple[bytes | None, int]:
    """Return the bytes at a place, which follow their length, and the place after them."""
    length, at = decode_varint(body, at)
    if length < 0:
        return None, at
    if at + length > len(body):
        raise ValueError("its length is wrong")
    return bytes(body[at : at + length]), at + length


def _consumer_record(
    partition: TopicPartition,
    offset: int,
    *,
    timestamp_ms: int = 0,
    key: bytes | None = None,
    value: bytes | None = None,
    headers: Sequence[tuple[str, bytes | None]] = (),
) -> ConsumerRecord[bytes, bytes]:
    sizes = (-1 if key is None else len(key), -1 if value is None else len(value))
    return ConsumerRecord(*partition, offset, timestamp_ms, 0, key, value, None, *sizes, tuple(headers))


def _unknown(partition: TopicPartition, offset: int, raw: bytes) -> ConsumerRecord[bytes, bytes]:
    return _consumer_record(partition, offset, value=raw, headers=[(CUT_HEADER, str(len(raw)).encode())])


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
