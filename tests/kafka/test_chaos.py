"""A short chaos campaign with a fixed seed on the shared system; ``make chaos`` runs longer ones."""

from __future__ import annotations

import msgspec

from tests.chaos.campaign import Campaign, CampaignConfig
from tests.chaos.report import markdown_of
from tests.kafka.conftest import Tripfold

SECONDS = 25.0
SEED = 20240514


async def test_chaos_leaves_no_difference(tripfold: Tripfold) -> None:
    """After random faults, the stored, published and served numbers are exact, and no record is dead-lettered."""
    system = tripfold.system
    config = msgspec.structs.replace(system.config, dates=("2024-05-14", "2024-05-15"))
    report = await Campaign(CampaignConfig(seconds=SECONDS, seed=SEED, system=config), system).run()
    assert report.differences == [], markdown_of(report)
    assert report.requests_ended.get("completed", 0) >= len(config.dates), markdown_of(report)
    assert sum(report.faults.values()) > 10, markdown_of(report)
