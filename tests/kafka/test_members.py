"""Members of consumer groups on a real Kafka: killed, joining, leaving, paused too long, and static.

Each test ends with the oracle: the stored, published and served sums are the upstream's.
"""

from __future__ import annotations

import os
import re
import signal

from shared.runtime.settings import PREFIX
from tests.chaos.system import System
from tests.chaos.upstream import UpstreamFault
from tests.integration.running import eventually
from tests.kafka.conftest import Tripfold, joined

SHORT_POLL_INTERVAL = """
import shared.kafka.consumer
import services.ingest.app
services.ingest.app.longest_fetch_s = services.ingest.app.longest_attempt_s = lambda *_: 0.0
shared.kafka.consumer.POLL_INTERVAL_SLACK_S = 3.0
from tripfold.cli import main
main()
"""
"""A worker with three seconds between two polls; the real limit is hours, too long for a test."""


async def test_killed_members_lose_nothing(tripfold: Tripfold) -> None:
    """A worker and an aggregate are killed during downloads; the request completes and is exact."""
    date = "2024-05-01"
    tripfold.system.upstream.rates = {UpstreamFault.SLOW: 1.0}
    location = await tripfold.post(date)
    await tripfold.downloads_started(date)
    tripfold.system.supervisor.kill("worker-1")
    tripfold.system.supervisor.kill("aggregate-2")
    await tripfold.completed(location)
    await tripfold.assert_exact(date)


async def test_members_that_join_and_leave_lose_nothing(tripfold: Tripfold) -> None:
    """A worker and an aggregate join and leave during downloads; no trip is lost or counted twice."""
    dates = ("2024-05-02", "2024-05-03")
    tripfold.system.upstream.rates = {UpstreamFault.SLOW: 1.0}
    locations = [await tripfold.post(dates[0])]
    async with joined(tripfold.system, "worker-3"), joined(tripfold.system, "aggregate-3"):
        locations.append(await tripfold.post(dates[1]))
        await tripfold.downloads_started(dates[1])
    for location in locations:
        await tripfold.completed(location)
    await tripfold.assert_exact(*dates)


async def test_a_worker_paused_beyond_its_session_does_no_harm(tripfold: Tripfold) -> None:
    """A worker is paused until others have taken over its work; when it continues, it changes nothing."""
    date = "2024-05-04"
    system = tripfold.system
    system.upstream.pause_s = 1.0
    async with joined(system, "worker-4", KAFKA_SESSION_TIMEOUT_S="6") as paused:
        location = await tripfold.post(date)
        await tripfold.downloads_started(date)
        os.kill(paused.pid, signal.SIGSTOP)
        try:
            await tripfold.completed(location)
        finally:
            os.kill(paused.pid, signal.SIGCONT)
            system.upstream.pause_s = 0.0
        await tripfold.ready("worker-4")
        await tripfold.assert_exact(date)
    await tripfold.assert_exact(date)


async def test_a_handler_slower_than_its_poll_interval_does_no_harm(tripfold: Tripfold) -> None:
    """A second worker gets the message of a slow one; one revision counts, whichever worker wins the race."""
    date = "2024-05-05"
    system = tripfold.system
    async with joined(system, "worker-5", program=("-c", SHORT_POLL_INTERVAL), KAFKA_SESSION_TIMEOUT_S="6"):
        system.upstream.pause_s = 5.0

        async def downloaded_twice() -> bool | None:
            counts = (count for target, count in system.upstream.requests_by_target.items() if f"date={date}" in target)
            return max(counts, default=0) > 1 or None

        try:
            location = await tripfold.post(date)
            await eventually(downloaded_twice, "two workers to process one message")
        finally:
            # While downloads are slow the group keeps rebalancing, and no commit succeeds.
            system.upstream.pause_s = 0.0
        await tripfold.completed(location)
        await tripfold.assert_exact(date)


async def test_a_static_member_that_restarts_causes_no_rebalance(tripfold: Tripfold) -> None:
    """A killed or stopped worker that returns within its session timeout continues without a rebalance."""
    dates = ("2024-05-06", "2024-05-07")
    system = tripfold.system
    await settled(system, "worker")  # a member of the previous test may just have left
    before = rebalances(system, "worker")
    for date, number in zip(dates, (signal.SIGKILL, signal.SIGTERM), strict=True):
        system.upstream.rates = {UpstreamFault.SLOW: 1.0}
        location = await tripfold.post(date)
        await tripfold.downloads_started(date)
        system.supervisor.kill("worker-1", number)
        await tripfold.completed(location)
        await tripfold.ready("worker-1")
    await tripfold.assert_exact(*dates)
    assert before, "the broker's log has no line about a rebalance"
    assert rebalances(system, "worker") == before


async def settled(system: System, group: str) -> None:
    """Wait until the latest rebalance of a group has ended."""

    async def look() -> bool | None:
        steps = [line for line in log_lines(system, group) if "Preparing to rebalance" in line or "Stabilized" in line]
        return (bool(steps) and "Stabilized" in steps[-1]) or None

    await eventually(look, f"the group {group} to have settled")


def rebalances(system: System, group: str) -> list[str]:
    """Return the lines about rebalances of a group in the broker's log."""
    return [line for line in log_lines(system, group) if "ebalanc" in line]


def log_lines(system: System, group: str) -> list[str]:
    """Return the lines about a group in the broker's log."""
    name = re.compile(re.escape(f"{system.environment[f'{PREFIX}TOPIC_PREFIX']}tripfold-{group}") + r"(?![\w-])")
    log = (system.brokers[0].data_dir / "kafka.log").read_text(errors="replace")
    return [line for line in log.splitlines() if name.search(line)]
