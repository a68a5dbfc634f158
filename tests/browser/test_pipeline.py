"""The view of the pipeline at ``/pipeline`` in a browser."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from shared.domain.topics import Topic
from shared.kafka.group_offsets import GroupOffsets
from tests.browser.scenes import ended, under_way
from tests.fakes.api import World, write


def test_the_pipeline_shows_lag_health_and_throughput(
    world: World, page: Page, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each consumer group has its lag; a stopped service is named; requests of the last hour are summed up."""
    monkeypatch.setattr("services.api.pipeline.service.REPORT_AGE_MAX_S", 600.0)  # each poll shows the first report
    world.offsets = [
        GroupOffsets(topic=Topic.CITY_TASKS, lag=1_240, committed=100, members=0),
        GroupOffsets(topic=Topic.CITY_STATS, lag=0, committed=100, members=None),
    ]
    write(world, ended(under_way()))
    page.goto(f"{address}/pipeline")
    row = page.get_by_role("row", name="city-tasks")
    expect(row).to_contain_text("worker fetches and counts files")
    expect(row.locator("td")).to_have_text(["city-tasks", "✕ stopped", "0", "1,240", "measuring"])
    expect(page.get_by_role("row", name="city-stats").locator("td").nth(1)).to_have_text("✓ idle")
    expect(page.get_by_text("No consumer runs: worker.")).to_be_visible()
    expect(page.locator("#pipeline .tiles div", has_text="Ended")).to_contain_text("1")


def test_an_outage_of_kafka_is_named(world: World, page: Page, address: str) -> None:
    """While Kafka cannot be asked, the view says so, and still shows what S3 has."""
    world.publisher.down = True
    page.goto(f"{address}/pipeline")
    expect(page.locator("#pipeline").get_by_role("alert")).to_contain_text("Kafka is unavailable")
    expect(page.get_by_text("Requests with progress in the last hour")).to_be_visible()
