"""Limits on the size of requests."""

from __future__ import annotations

from services.api.middleware import size_limits
from tests.fakes.api import World


def test_oversized_requests_are_refused() -> None:
    """A URL, headers or a body over the limit are refused with a problem."""
    with World().client() as client:
        long = client.get("/country-stats?country=" + "x" * size_limits.URL_BYTES_MAX)
        assert (long.status_code, long.headers["content-type"]) == (414, "application/problem+json")
        large = client.get("/process-requests", headers={"X-Large": "x" * size_limits.HEADER_BYTES_MAX})
        assert (large.status_code, large.headers["content-type"]) == (431, "application/problem+json")
        heavy = client.post("/process-request?date=2024-05-01", content=b"x" * (size_limits.BODY_BYTES_MAX + 1))
        assert (heavy.status_code, heavy.headers["content-type"]) == (413, "application/problem+json")
