"""Identifiers and field types: country slugs, city ids, request ids, revisions, instants."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import re
from typing import Annotated, NewType

import msgspec

CountrySlug = NewType("CountrySlug", str)
CityId = NewType("CityId", str)
RequestId = NewType("RequestId", str)

SLUG_LENGTH_MAX = 80 + 1 + 8  # the slug, a dash, and eight digits of a hash
CITY_ID_LENGTH_MAX = 160
NAME_LENGTH_MAX = 300
EXACT_MAX = 2**53 - 1
"""The greatest integer that every reader of JSON represents exactly: a browser has no larger ones."""
REVISION_MAX = 2**32 - 1
"""Revisions begin at the seconds since 2020, so this is the year 2156. Two million of them add up to EXACT_MAX at most.

The bound does not follow the time: a process whose clock is wrong would send good records to the dead letters.
"""
REVISION_FLOOR_MAX = REVISION_MAX - 1_000_000
"""A bucket whose revisions begin here can still change each city-day a million times."""

# Field types of events and stored objects, validated when one is decoded. Python's ``$`` also matches before a final
# newline, hence ``(?!\n)``. A request id begins with 0 until the year 2527.
CountryField = Annotated[
    CountrySlug, msgspec.Meta(pattern=r"^[a-z0-9-]+$(?!\n)", max_length=SLUG_LENGTH_MAX, examples=["armenia"])
]
CityField = Annotated[CityId, msgspec.Meta(pattern=r"^[^/\s]+$(?!\n)", max_length=CITY_ID_LENGTH_MAX, examples=["7"])]
RequestField = Annotated[
    RequestId,
    msgspec.Meta(
        pattern=r"^0[0-9a-f]{7}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$(?!\n)",
        examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"],
    ),
]
NameField = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_LENGTH_MAX)]
RevisionField = Annotated[int, msgspec.Meta(ge=1, le=REVISION_MAX)]
CountField = Annotated[int, msgspec.Meta(ge=0, le=EXACT_MAX)]
SchemaVersionField = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
InstantField = Annotated[dt.datetime, msgspec.Meta(tz=True)]

_REQUEST_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def mint_request_id(now: dt.datetime) -> RequestId:
    """Create a request id: a UUID of version 7 (RFC 9562, 5.7). Ids sort by the time in their first 48 bits."""
    return _uuid_7(now, os.urandom(10))


def derive_request_id(at: dt.datetime, name: str) -> RequestId:
    """Return the request id of a time and a name: the same id for the same two, and another for any others."""
    return _uuid_7(at, hashlib.sha256(name.encode()).digest()[:10])


def _uuid_7(at: dt.datetime, noise_bytes: bytes) -> RequestId:
    milliseconds = int(at.timestamp() * 1000)
    noise = int.from_bytes(noise_bytes, "big")
    value = milliseconds << 80 | 0x7 << 76 | (noise >> 68) << 64 | 0b10 << 62 | noise & (1 << 62) - 1
    digits = f"{value:032x}"
    return RequestId(f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}")


def parse_request_id(text: str) -> RequestId | None:
    """Return ``text`` as a request id, or None if it is not a valid one."""
    return RequestId(text) if _REQUEST_ID.fullmatch(text) else None


def request_time_ms(request_id: RequestId) -> int:
    """Return the time of a request id in milliseconds since 1970."""
    return int(request_id[:8] + request_id[9:13], 16)


def utc_now() -> dt.datetime:
    """Return the current time in UTC. Services pass this clock in where time matters."""
    return dt.datetime.now(dt.UTC)
