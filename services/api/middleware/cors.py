"""CORS: pages of other origins may use the API if the settings name them."""

from __future__ import annotations

from litestar.config.cors import CORSConfig

PREFLIGHT_AGE_MAX_S = 600
EXPOSED = ["ETag", "Location", "Preference-Applied", "Retry-After", "Tripfold-Unreadable", "X-Request-ID"]
ALLOWED = ["Authorization", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Prefer", "X-API-Key", "X-Request-ID"]


def cors_config(origins: str) -> CORSConfig | None:
    """Return the CORS rules for the origins of the setting, or None if it names none."""
    allowed = [origin.strip() for origin in origins.split(",") if origin.strip()]
    if not allowed:
        return None
    return CORSConfig(
        allow_origins=allowed,
        allow_methods=["GET", "POST", "PUT", "DELETE"],
        allow_headers=ALLOWED,
        expose_headers=EXPOSED,
        allow_credentials=False,
        max_age=PREFLIGHT_AGE_MAX_S,
    )
