"""Resumes a broken download at the next byte with a range request (RFC 9110, 13.1.5 and 14). Pure.

A part is accepted only if it cannot belong to another file. The request names a strong validator. The response must
start at the requested byte and end at the end of the file. If it has a validator, that must be the same. Neither httpx
nor aiohttp resumes a download.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from services.ingest.upstream.errors import TransientUpstreamError

_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,1000}"')
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", re.IGNORECASE)


class CannotResume(TransientUpstreamError):
    """The rest of the file cannot be fetched alone; the whole file must be downloaded again."""


class Resumable(msgspec.Struct, frozen=True, kw_only=True):
    """The headers of the first response that a resumption needs; ``bytes_total`` is None if unknown."""

    if_range: str
    etag: str | None
    last_modified: str | None
    bytes_total: int | None


def resumable(headers: Mapping[str, str], *, last_modified: str | None, bytes_total: int | None) -> Resumable | None:
    """Return how a download with these headers can go on after a break, or None if it cannot.

    ``last_modified`` is the date of the response, if it is a strong validator.
    """
    if headers.get("accept-ranges", "").strip().lower() == "none":
        return None
    etag = headers.get("etag", "").strip()
    strong = etag if _STRONG_ETAG.fullmatch(etag) else None
    if_range = strong or last_modified
    if if_range is None:
        return None
    return Resumable(if_range=if_range, etag=strong, last_modified=last_modified, bytes_total=bytes_total)


def range_headers(first: Resumable, done_bytes: int) -> dict[str, str]:
    """Return the headers that ask for the rest of a file after ``done_bytes``, if it still is the same file."""
    return {"range": f"bytes={done_bytes}-", "if-range": first.if_range, "accept-encoding": "identity"}


def part_bytes(first: Resumable, done_bytes: int, *, status: int, headers: Mapping[str, str]) -> int:
    """Return how many bytes a response adds to the first ``done_bytes``. Raises CannotResume if it starts elsewhere."""
    if status == 200:
        raise CannotResume("the file changed while it was downloaded, or its rest is not given alone")
    if status != 206:
        raise CannotResume(f"the rest of the file was answered with {status}")
    if headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        raise CannotResume("the rest of the file came in another content-encoding")
    written = headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(written.strip())
    if match is None:
        raise CannotResume(f"the rest of the file came with content-range {written[:100]!r}")
    start, last, total = map(int, match.groups())
    if start != done_bytes or last != total - 1 or first.bytes_total not in {None, total}:
        raise CannotResume(f"asked for the bytes from {done_bytes}, got content-range {written[:100]!r}")
    etag = headers.get("etag")
    if first.etag is not None and etag is not None and etag.strip() != first.etag:
        raise CannotResume(f"the file changed while it was downloaded: its ETag was {first.etag}, is {etag[:100]}")
    changed_date = first.last_modified is not None and headers.get("last-modified") not in {None, first.last_modified}
    if first.etag is None and changed_date:
        raise CannotResume("the file changed while it was downloaded: its Last-Modified is another")
    return last + 1 - start
