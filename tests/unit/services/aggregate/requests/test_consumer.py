"""The consumer of request-progress: what it logs."""

from __future__ import annotations

from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from tests.fault.scenarios import FIRST
from tests.fault.world import World


async def test_each_change_of_a_status_is_logged_once_under_the_id_of_the_request() -> None:
    """The log of the aggregate tells how a request went on and how it ended, with its counts."""
    world = World()
    with capture_logs(processors=[merge_contextvars]) as logged:
        request_id = world.request(FIRST)
        await world.run_to_rest()
    changes = [line for line in logged if line["event"] == "request_status_changed"]
    assert {line["request_id"] for line in changes} == {request_id}
    assert len(changes) == len({line["status"] for line in changes})
    assert (changes[-1]["status"], changes[-1]["cities_stored"], changes[-1]["cities_failed"]) == (
        "completed with failures",
        2,
        1,
    )
