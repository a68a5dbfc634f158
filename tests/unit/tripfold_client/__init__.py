"""The tests of the Python client."""

from __future__ import annotations

from typing import Any

REQUEST: dict[str, Any] = {
    "id": "018f3d2a-5c00-7aaa-8bbb-0123456789ab",
    "date": "2024-05-01",
    "status": "accepted",
    "version": 1,
    "requested_at": "2024-06-01T00:00:00Z",
    "updated_at": "2024-06-01T00:00:00Z",
    "counts": {
        "cities_total": 0,
        "cities_done": 0,
        "cities_failed": 0,
        "cities_skipped": 0,
        "cities_unchanged": 0,
        "bytes_done": 0,
        "trips_done": 0,
    },
}
"""A request as the API shows it."""
