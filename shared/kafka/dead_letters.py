"""Dead letters: records that cannot be processed, published with their origin and the error in headers."""

from __future__ import annotations

import msgspec

from shared.domain.topics import RECORD_BYTES_MAX
from shared.kafka.records import ConsumedRecord

ERROR_HEADER_LENGTH_MAX = 1_000
ORIGIN_TOPIC_HEADER = "tripfold_origin_topic"
ORIGIN_PARTITION_HEADER = "tripfold_origin_partition"
ORIGIN_OFFSET_HEADER = "tripfold_origin_offset"
ERROR_HEADER = "tripfold_error"
DEAD_LETTER_HEADERS = (ORIGIN_TOPIC_HEADER, ORIGIN_PARTITION_HEADER, ORIGIN_OFFSET_HEADER, ERROR_HEADER)
"""The headers that a dead letter has after the original ones, in this order."""

CUT_HEADER = "tripfold_cut_from_bytes"
"""The length of the original, in a dead letter that holds only its beginning, or bytes that cannot be decoded."""
CUT_KEY_BYTES_MAX = 32 * 1024


def as_dead_letter(record: ConsumedRecord, error: str) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]:
    """Return the key, value and headers of a record's dead letter.

    A record can be longer than the dead letter topic accepts, because producers compress records. Its dead letter then
    has no original headers, a cut value and the header CUT_HEADER, so that the partition is not blocked.
    """
    kept_bytes = sum(len(name.encode()) + len(value) for name, value in record.headers) + len(record.key or b"")
    whole_bytes = kept_bytes + len(record.value or b"")
    if whole_bytes <= RECORD_BYTES_MAX:
        return record.key, record.value, dead_letter_headers(record, error)
    cut = msgspec.structs.replace(record, headers=((CUT_HEADER, str(whole_bytes).encode()),))
    key = record.key and record.key[:CUT_KEY_BYTES_MAX]
    return key, record.value and record.value[: RECORD_BYTES_MAX - CUT_KEY_BYTES_MAX], dead_letter_headers(cut, error)


def dead_letter_headers(record: ConsumedRecord, error: str) -> list[tuple[str, bytes]]:
    """Return the headers of a record's dead letter: the original ones, then its origin and the error."""
    origin = (record.topic.value, str(record.partition), str(record.offset), error[:ERROR_HEADER_LENGTH_MAX])
    return [
        *record.headers,
        *(
            (name, text.encode(errors="backslashreplace"))
            for name, text in zip(DEAD_LETTER_HEADERS, origin, strict=True)
        ),
    ]
