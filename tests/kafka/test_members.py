"""Members of consumer groups on a real Kafka: killed, joining, leaving, paused too long, restarted under their name.

Each scenario ends with the oracle: what is stored, logged and served is the upstream's truth.
"""

from __future__ import annotations

import os
import signal

from shared.runtime.settings import PREFIX
from tests.chaos.system import System
from tests.chaos.upstream import Mischief
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
"""A worker that Kafka gives three seconds between two polls: in earnest it is hours, which no test can wait for."""


async def test_members_killed_in_mid_work_lose_nothing(tripfold: Tripfold) -> None:
    """A worker and an aggregate killed with -9 while cities stream: the request completes, and it is exact."""
    date = "2024-05-01"
    tripfold.system.upstream.rates = {Mischief.SLOW: 1.0}
    place = await tripfold.post(date)
    await tripfold.under_way(date)
    tripfold.system.supervisor.kill("worker-1")
    tripfold.system.supervisor.kill("aggregate-2")
    await tripfold.completed(place)
    await tripfold.exact(date)


async def test_members_join_and_leave_in_mid_work(tripfold: Tripfold) -> None:
    """A worker and an aggregate join, and leave again by SIGTERM, while cities stream; nothing is lost or doubled."""
    dates = ("2024-05-02", "2024-05-03")
    tripfold.system.upstream.rates = {Mischief.SLOW: 1.0}
    places = [await tripfold.post(dates[0])]
    async with joined(tripfold.system, "worker-3"), joined(tripfold.system, "aggregate-3"):
        places.append(await tripfold.post(dates[1]))
        await tripfold.under_way(dates[1])
    for place in places:
        await tripfold.completed(place)
    await tripfold.exact(*dates)


async def test_a_worker_paused_beyond_its_session_does_no_harm(tripfold: Tripfold) -> None:
    """A worker that stands still until others have taken its work over, and then goes on with it, changes nothing."""
    date = "2024-05-04"
    system = tripfold.system
    system.upstream.pause_s = 1.0
    async with joined(system, "worker-4", KAFKA_SESSION_TIMEOUT_S="6") as paused:
        place = await tripfold.post(date)
        await tripfold.under_way(date)
        os.kill(paused.pid, signal.SIGSTOP)
        try:
            await tripfold.completed(place)
        finally:
            os.kill(paused.pid, signal.SIGCONT)
            system.upstream.pause_s = 0.0
        await tripfold.ready("worker-4")
        await tripfold.exact(date)
    await tripfold.exact(date)


async def test_a_handler_that_outlives_its_poll_interval_does_no_harm(tripfold: Tripfold) -> None:
    """Two workers take one message, for the first is too slow; one revision counts, whoever wins the race."""
    date = "2024-05-05"
    system = tripfold.system
    async with joined(system, "worker-5", program=("-c", SHORT_POLL_INTERVAL), KAFKA_SESSION_TIMEOUT_S="6"):
        system.upstream.pause_s = 5.0

        async def taken_twice() -> bool | None:
            asked = (count for target, count in system.upstream.asked.items() if f"date={date}" in target)
            return max(asked, default=0) > 1 or None

        try:
            place = await tripfold.post(date)
            await eventually(taken_twice, "two workers to take one message")
        finally:
            # As long as this goes on, the group is rebalanced again and again, and nobody's commit holds.
            system.upstream.pause_s = 0.0
        await tripfold.completed(place)
        await tripfold.exact(date)


async def test_a_static_member_that_restarts_causes_no_rebalance(tripfold: Tripfold) -> None:
    """A worker with a name of its own, back within its session, goes on without a rebalance, killed or ended."""
    dates = ("2024-05-06", "2024-05-07")
    system = tripfold.system
    await settled(system, "worker")  # the member of a test before this one may just have left
    before = rebalances(system, "worker")
    for date, number in zip(dates, (signal.SIGKILL, signal.SIGTERM), strict=True):
        system.upstream.rates = {Mischief.SLOW: 1.0}
        place = await tripfold.post(date)
        await tripfold.under_way(date)
        system.supervisor.kill("worker-1", number)
        await tripfold.completed(place)
        await tripfold.ready("worker-1")
    await tripfold.exact(*dates)
    assert before, "the broker logs rebalances in another way than this test knows"
    assert rebalances(system, "worker") == before


async def settled(system: System, group: str) -> None:
    """Wait until the last rebalance of a group that has begun has ended."""

    async def look() -> bool | None:
        turns = [line for line in told_of(system, group) if "Preparing to rebalance" in line or "Stabilized" in line]
        return (bool(turns) and "Stabilized" in turns[-1]) or None

    await eventually(look, f"the group {group} to have settled")


def rebalances(system: System, group: str) -> list[str]:
    """Return the lines of the broker's log that tell of a rebalance of a group."""
    return [line for line in told_of(system, group) if "ebalanc" in line]


def told_of(system: System, group: str) -> list[str]:
    """Return the lines of the broker's log that name a group."""
    assert system.kafka is not None
    name = f"{system.environment[f'{PREFIX}TOPIC_PREFIX']}tripfold-{group}"
    log = (system.kafka.data_dir / "kafka.log").read_text(errors="replace")
    return [line for line in log.splitlines() if name in line]
