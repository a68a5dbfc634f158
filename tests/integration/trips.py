"""Makes trips, and computes the figures that the API must report for them."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

from tests.fakes.bucket import DAY


def make_trips(seed: int, count: int, date: str) -> list[dict[str, Any]]:
    """Make trips as the upstream writes them."""
    draw = random.Random(seed)
    return [
        {
            "departure-time": f"{date}T{draw.randrange(24):02}:{draw.randrange(60):02}:00",
            "bus-type": f"BUS-{draw.randrange(200)}",
            "passengers": draw.randrange(90),
            "delay": f"PT{draw.randrange(5000)}S",
            "accident": draw.random() < 0.05,
        }
        for _ in range(count)
    ]


def figures_of(*files: list[dict[str, Any]]) -> dict[str, Any]:
    """Work out what the API has to say of a country-day whose cities have these files."""
    trips = [trip for file in files for trip in file]
    delay_s = sum(int(trip["delay"].removeprefix("PT").removesuffix("S")) for trip in trips)
    return {
        "bus_count": len(trips),
        "passenger_count": sum(trip["passengers"] for trip in trips),
        "exist_accident": any(trip["accident"] for trip in trips),
        "average_delay_s": round(Fraction(delay_s * 1000, len(trips))) / 1000 if trips else 0,
    }


OTHER_DATE = "2024-05-02"


TRIPS = [
    {
        "departure-time": f"{DAY}T10:{minute:02}:00",
        "bus-type": "BUS-1",
        "passengers": minute,
        "delay": "PT61S",
        "accident": minute == 7,
    }
    for minute in range(50)
]
