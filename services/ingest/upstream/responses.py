"""Reads and checks the head of an upstream response: status, type, length, validators and Retry-After. Pure."""

from __future__ import annotations

import datetime as dt
import email.utils
import re

import httpx

from services.ingest.upstream.decoding import Decoder, UnknownCoding, decoder_of
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError
from services.ingest.upstream.port import Validators

LAST_MODIFIED_AGE_MIN_S = 60.0

_JSON_TYPE = re.compile(
    r"application/([a-z0-9.-]+\+)?json|text/json|(application|text)/(x-)?(ndjson|jsonl|json-?lines)"
)
_OPAQUE_TYPES = {"", "text/html", "text/plain", "application/octet-stream", "binary/octet-stream"}
_SENDABLE = re.compile(r"[\x20-\x7e]{1,1000}")


def require_not_busy(response: httpx.Response, url: str) -> None:
    """Raise TransientUpstreamError for a status that may pass."""
    status = response.status_code
    if status in {408, 425, 429} or status >= 500:
        retry_after_s = _retry_after_s(response.headers.get("retry-after", ""))
        raise TransientUpstreamError(f"{url} answered {status}", retry_after_s=retry_after_s)


def require_ok(response: httpx.Response, url: str) -> None:
    """Raise TransientUpstreamError or PermanentUpstreamError unless the status is 200."""
    require_not_busy(response, url)
    if response.status_code == 404:
        if url.endswith("/cities"):
            raise PermanentUpstreamError(
                f"{url} answered 404: the upstream has no list of cities; check TRIPFOLD_UPSTREAM_URL"
            )
        raise PermanentUpstreamError(f"{url} answered 404: the upstream has no file for this city and date")
    if response.status_code != 200:
        raise PermanentUpstreamError(f"{url} answered {response.status_code}")


def require_readable_type(response: httpx.Response, url: str) -> None:
    """Raise PermanentUpstreamError for a content type that is known not to be JSON."""
    written = response.headers.get("content-type", "")
    essence = written.partition(";")[0].strip().lower()
    if essence not in _OPAQUE_TYPES and not _JSON_TYPE.fullmatch(essence):
        raise PermanentUpstreamError(f"{url} answered with content-type {written[:100]!r}, which is not JSON")


def decoder_for(response: httpx.Response, url: str) -> Decoder | None:
    """Return the decoder of the response's content-encoding, or None if it has none."""
    try:
        return decoder_of(response.headers.get("content-encoding", ""))
    except UnknownCoding as error:
        raise PermanentUpstreamError(f"{url} answered with {error}") from error


def content_length(response: httpx.Response) -> int | None:
    """Return the length of the body, or None if the response does not say."""
    if "transfer-encoding" in response.headers:
        return None  # Transfer-Encoding overrides Content-Length (RFC 9112, 6.3)
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 16 else None  # a longer one is no length of a file


def validators_in(response: httpx.Response) -> Validators:
    """Return the validators of a response that can be sent back. A Last-Modified counts if it is a minute old.

    A younger one cannot distinguish two changes within the same second (RFC 9110, 8.8.2.2).
    """
    etag = response.headers.get("etag", "")
    last_modified = response.headers.get("last-modified", "")
    modified, given = _http_date(last_modified), _http_date(response.headers.get("date", ""))
    is_strong = modified and given and (given - modified).total_seconds() >= LAST_MODIFIED_AGE_MIN_S
    return Validators(
        etag=etag if _SENDABLE.fullmatch(etag) else None,
        last_modified=last_modified if is_strong and _SENDABLE.fullmatch(last_modified) else None,
    )


def _retry_after_s(value: str) -> float:
    """Return the seconds in a Retry-After header (RFC 9110, 10.2.3), or 0 if it cannot be read."""
    if value.isdecimal():
        return float(value[:9])
    at = _http_date(value)
    return 0.0 if at is None else max(0.0, (at - dt.datetime.now(dt.UTC)).total_seconds())


def _http_date(value: str) -> dt.datetime | None:
    try:
        read = email.utils.parsedate_to_datetime(value)
        return read.replace(tzinfo=read.tzinfo or dt.UTC).astimezone(dt.UTC)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
