"""Security headers."""

from __future__ import annotations

import pytest

from tests.fakes.api import World


@pytest.mark.parametrize("path", ["/", "/docs", "/process-requests", "/nothing", "/health/live"])
def test_every_response_has_the_security_headers(path: str) -> None:
    """Every response, including errors, has the security headers."""
    with World().client() as client:
        headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert len(headers.get_list("content-security-policy")) == 1
