"""Content negotiation, ``Prefer: wait`` and ETags."""

from __future__ import annotations

import pytest

from services.api.http.etag import matches, strong_etag
from services.api.http.negotiation import NotAcceptable, content_coding, media_type
from services.api.middleware.compression import CODINGS
from services.api.requests.event_stream import wait_s
from services.api.statistics.formats import CSV, JSON, MEDIA_TYPES, NDJSON


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("text/csv", CSV),
        ("TEXT/CSV; header=present", CSV),
        ("text/*", CSV),
        ("application/x-ndjson", NDJSON),
        ("application/json;q=0.2, text/csv;q=0.9", CSV),
        ("text/html, */*;q=0.8", JSON),
        ("application/json;q=0, */*", NDJSON),
        ("*/*;q=0.1, text/csv;q=0.1", JSON),
        ("text/csv;q=lots, application/x-ndjson;q=0.1", NDJSON),
    ],
)
def test_highest_ranked_media_type_wins(accept: str, chosen: str) -> None:
    """The highest rank wins, a name ranks before a wildcard, and of equals JSON comes first."""
    assert media_type(accept, MEDIA_TYPES) == chosen


@pytest.mark.parametrize("accept", ["text/html", "application/xml, image/*", "*/*;q=0"])
def test_not_acceptable_names_the_offered_types(accept: str) -> None:
    """The problem lists the offered media types to a client that accepts none of them."""
    with pytest.raises(NotAcceptable, match="text/csv"):
        media_type(accept, MEDIA_TYPES)


@pytest.mark.parametrize(
    ("accept_encoding", "chosen"),
    [
        ("", "identity"),
        ("identity", "identity"),
        ("br", "identity"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip, deflate", "gzip"),
        ("zstd;q=0.5, gzip", "gzip"),
        ("*", "zstd"),
        ("gzip;q=0", "identity"),
        ("gzip;q=0.2, identity;q=0.5", "identity"),
    ],
)
def test_coding_is_used_only_for_clients_that_accept_it(accept_encoding: str, chosen: str) -> None:
    """A coding is used only for a client that asks for one."""
    assert content_coding(accept_encoding, CODINGS) == chosen


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("", None),
        ("wait=10", 10),
        ("respond-async, Wait = 5", 5),
        ('wait="7"; foo=bar', 7),
        ("wait=0", 0),
        ("wait=9999", 60),
        ("wait=-1", None),
        ("wait=soon", None),
        ("await=3", None),
    ],
)
def test_prefer_wait_is_bounded(prefer: str, seconds: int | None) -> None:
    """A wait is bounded, and an invalid preference is ignored."""
    assert wait_s(prefer) == seconds


def test_etag_depends_on_the_split_of_its_parts() -> None:
    """The same characters, split into other parts, make another ETag."""
    assert strong_etag(["ab", "c"]) != strong_etag(["a", "bc"]) != strong_etag(["abc"])


@pytest.mark.parametrize(
    ("if_none_match", "known"),
    [("", False), ('"a"', True), ('"b", W/"a"', True), ("*", True), ('"aa"', False), ("a", False)],
)
def test_if_none_match_accepts_any_listed_etag(if_none_match: str, known: bool) -> None:
    """A response counts as known if the client lists its ETag."""
    assert matches(if_none_match, '"a"') == known
