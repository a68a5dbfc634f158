"""CORS: only the origins of the settings may read responses."""

from __future__ import annotations

from tests.fakes.api import World

PATH = "/process-request?date=2024-05-01"


def test_cors_allows_the_origins_of_the_settings() -> None:
    """Pages of the origins in the settings may use the API, and no others."""
    origin = "https://dashboard.example.com"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "idempotency-key"}
    with World().client(api_cors_origins=f"{origin}, https://other.example.com") as client:
        allowed = client.options(PATH, headers={"Origin": origin, **asked})
        assert allowed.headers["access-control-allow-origin"] == origin
        assert "idempotency-key" in allowed.headers["access-control-allow-headers"].lower()
        read = client.get("/process-requests", headers={"Origin": origin})
        assert read.headers["access-control-allow-origin"] == origin
        assert "etag" in read.headers["access-control-expose-headers"].lower()
        refused = client.get("/process-requests", headers={"Origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in refused.headers
    with World().client() as client:
        assert "access-control-allow-origin" not in client.get("/process-requests", headers={"Origin": origin}).headers
