"""Half a minute of chaos on the shared system, by a fixed seed; ``make chaos`` does it for as long as one likes."""

from __future__ import annotations

import msgspec

from tests.chaos.campaign import Campaign, Plan
from tests.chaos.report import markdown_of
from tests.kafka.conftest import Tripfold

SECONDS = 25.0
SEED = 20240514


async def test_half_a_minute_of_chaos_leaves_no_difference(tripfold: Tripfold) -> None:
    """Whatever failed meanwhile, what is stored, logged and served at rest is exact, and nothing is dead-lettered."""
    system = tripfold.system
    shape = msgspec.structs.replace(system.shape, dates=("2024-05-14", "2024-05-15"))
    report = await Campaign(Plan(seconds=SECONDS, seed=SEED, shape=shape), system).run()
    assert report.differences == [], markdown_of(report)
    assert report.requests_ended.get("completed", 0) >= len(shape.dates), markdown_of(report)
    assert sum(report.faults.values()) > 10, markdown_of(report)
