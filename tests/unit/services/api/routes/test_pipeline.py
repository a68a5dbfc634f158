"""``GET /pipeline-status``."""

from __future__ import annotations

from shared.domain.topics import Topic
from shared.kafka.group_offsets import GroupOffsets
from tests.fakes.api import Client, World


def test_the_pipeline_is_reported_also_in_an_outage(world: World, client: Client) -> None:
    """The report has each stage; in an outage of S3 it is 200 too, and names the fault."""
    world.offsets = [GroupOffsets(topic=Topic.CITY_STATS, lag=3, committed=10, members=2)]
    world.store.down = True
    response = client.get("/pipeline-status")
    assert response.status_code == 200
    report = response.json()
    assert report["stages"] == [
        {
            "service": "aggregate",
            "topic": "city-stats",
            "state": "working",
            "consumers": 2,
            "lag": 3,
            "records_per_second": None,
        }
    ]
    assert (report["ready"], report["throughput"], list(report["faults"])) == (True, None, ["s3"])
