"""Any bytes and any headers end in the file or in a named fault, and are counted once."""

from __future__ import annotations

import contextlib
import gzip

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError
from services.ingest.upstream.port import Validators
from services.ingest.worker.streaming import FileRefused
from tests.integration.services.ingest.upstream.client import (
    BOMB,
    DAY,
    GOOD,
    client_of,
    counted,
)
from tests.integration.services.ingest.upstream.hostile import (
    Answer,
    HostileServer,
    head_of,
    raw,
    whole,
)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (GOOD, "complete"),
        (raw(head_of(304)), "unchanged"),
        (whole(b"", 404), "refused"),
        (whole(b"", 500), "interrupted"),
        (raw(head_of(content_length="9") + b"["), "interrupted"),
        (whole(b"{}" + b" " * 5_000_000), "complete"),
        (whole(gzip.compress(BOMB), content_encoding="gzip"), "aborted"),
        (whole(b"", 302, location="http://example.com/"), "redirected"),
    ],
)
async def test_requests_are_counted_once_by_how_they_ended(answer: Answer, outcome: str) -> None:
    """Each request is counted once in the metric, under its outcome."""
    outcomes = ("complete", "unchanged", "redirected", "refused", "interrupted", "unavailable", "aborted")
    before = {name: counted(name) for name in outcomes}
    async with HostileServer(answer) as server, client_of(server.url) as client:
        with contextlib.suppress(TransientUpstreamError, PermanentUpstreamError, FileRefused):
            await client.attempt(known=Validators(etag='"v1"'))
    assert {name: counted(name) - before[name] for name in outcomes} == {
        name: float(name == outcome) for name in outcomes
    }


@given(st.binary(max_size=300), st.booleans(), st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", head_of()]))
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_bytes_end_in_a_named_fault(data: bytes, reset: bool, before: bytes) -> None:
    """For any bytes from a server the client raises one of its three errors, and nothing else."""
    async with HostileServer(raw(before + data, reset=reset)) as server, client_of(server.url) as client:
        with contextlib.suppress(TransientUpstreamError, PermanentUpstreamError, FileRefused):
            await client.attempt()


@given(
    st.dictionaries(
        st.sampled_from(
            ["etag", "last_modified", "date", "content_type", "content_encoding", "retry_after", "location", "age"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40),
    ),
    st.sampled_from([200, 204, 206, 301, 304, 307, 404, 416, 429, 503]),
)
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_headers_end_in_a_file_or_a_named_fault(headers: dict[str, str], status: int) -> None:
    """No header can do more than fail its city; kept validators can be sent back."""
    async with HostileServer(whole(b"[]", status, **headers)) as server, client_of(server.url) as client:
        with contextlib.suppress(TransientUpstreamError, PermanentUpstreamError, FileRefused):
            async with client.upstream.download("1", DAY, None) as download:
                validators = download.validators
            with contextlib.suppress(TransientUpstreamError, PermanentUpstreamError, FileRefused):
                await client.attempt(known=validators)
