"""Run the alert drill: ``python -m tests.alert_drill [--broker kafka|embedded] [--only TEXT]``.

Each drill injects a fault into a deployment under load, until Prometheus fires the expected alert. At rest, and for a
fault that Tripfold absorbs, no alert may fire. The result is a table, and exit code 1 if an alert did not fire in time
or fired without reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
import msgspec

from scripts.alerts import ALERTS
from scripts.dashboard import PANELS
from shared.kafka.admin import apply_topics
from shared.runtime.settings import load_settings
from tests.alert_drill.drills import DATES, DRILLS, NEW_DATE, QUIET_DATE, Drill
from tests.alert_drill.running import Deployment, Prometheus, prometheus
from tests.apache_kafka import reason_unavailable
from tests.chaos.system import System, SystemConfig, running_system
from tests.integration.running import ENDED, eventually

SERVICES = ("api", "planner", "worker-1", "aggregate-1")
INTERVAL_S = 5
"""The interval of scrapes and evaluations, as in deploy/."""
FIRES_WITHIN_S = 100.0
RESOLVES_WITHIN_S = 180.0
BASELINE_S = 4.0 * INTERVAL_S
LOAD_INTERVAL_S = 1.0
METRICS_WITHIN_S = 90.0
"""Some metrics are measured once a minute."""
LOOKS_BACK = re.compile(r"\b(rate|increase)\(")


class Outcome(msgspec.Struct, kw_only=True):
    """The result of a drill. Times are from the fault to the alert, and from the end of the fault to its end."""

    fault: str
    alert: str | None
    fired_after_s: float | None = None
    resolved_after_s: float | None = None
    others: set[str] = msgspec.field(default_factory=set)
    error: str = ""


def settings() -> SystemConfig:
    """Return a deployment with one process of each kind and the default times of production."""
    defaults = {
        "RETRY_WAIT_MAX_S": "30",
        "UPSTREAM_READ_TIMEOUT_S": "30",
        "STALLED_REQUEST_AFTER_S": "600",
        "PROGRESS_INTERVAL_S": "1",
    }
    return SystemConfig(
        services=SERVICES,
        cities=6,
        dates=(*DATES, NEW_DATE),
        large_files=False,
        session_timeout_s=30,
        static_members=False,
        settings=tuple(defaults.items()),
    )


async def use(deployment: Deployment) -> None:
    """Request and read dates, as users do, while the upstream corrects files."""
    system = deployment.system
    for date in itertools.cycle(date for date in DATES if date != QUIET_DATE):
        await deployment.busy.wait()
        system.upstream.correct(date)
        await deployment.request(date)
        with contextlib.suppress(httpx.HTTPError):
            await system.client.get(f"{system.api_url}/country-stats", params={"from": DATES[0], "to": DATES[-1]})
        await asyncio.sleep(LOAD_INTERVAL_S)


async def process(system: System, date: str) -> None:
    """Request a date, and wait until it is processed."""
    response = await system.client.post(f"{system.api_url}/process-request", params={"date": date})
    location = response.headers["location"]

    async def ended() -> bool | None:
        return (await system.client.get(f"{system.api_url}{location}")).json()["status"] in ENDED or None

    await eventually(ended, f"{date} to be processed")


async def run(drill: Drill, deployment: Deployment, directory: Path) -> Outcome:
    """Run one drill with a new Prometheus."""
    outcome = Outcome(fault=drill.fault, alert=drill.alert)
    await deployment.ready()
    async with prometheus(deployment, directory, INTERVAL_S) as server:
        await asyncio.sleep(BASELINE_S)
        if before := await server.firing():
            outcome.error = f"{', '.join(sorted(before))} fired before the fault"
            return outcome
        injected_s = time.monotonic()
        async with drill.inject(deployment):
            await _watch(drill, server, outcome, injected_s)
        ended_s = time.monotonic()
        await deployment.ready()
        if outcome.fired_after_s is not None and not looks_back(drill.alert):
            while drill.alert in await server.firing():
                if time.monotonic() > ended_s + RESOLVES_WITHIN_S:
                    outcome.error = f"it still fires {RESOLVES_WITHIN_S:.0f} s after the end of the fault"
                    return outcome
                await asyncio.sleep(1)
            outcome.resolved_after_s = time.monotonic() - ended_s
    return outcome


async def _watch(drill: Drill, server: Prometheus, outcome: Outcome, injected_s: float) -> None:
    """Wait until the alert fires, or time is up; note the others."""
    while time.monotonic() < injected_s + FIRES_WITHIN_S:
        firing = await server.firing()
        outcome.others |= firing - {drill.alert}
        if drill.alert in firing:
            outcome.fired_after_s = time.monotonic() - injected_s
            return
        await asyncio.sleep(1)
    if drill.alert is not None:
        outcome.error = f"it did not fire within {FIRES_WITHIN_S:.0f} s"
    elif outcome.others:
        outcome.error = "an alert fired without reason"


def looks_back(name: str | None) -> bool:
    """Return whether an alert looks back, so that it ends long after its fault."""
    return any(LOOKS_BACK.search(alert.expr) for alert in ALERTS if alert.name == name)


async def missing_metrics(deployment: Deployment, directory: Path) -> list[str]:
    """Return the metrics that an alert or a panel queries, and that no process exports after some work."""
    queried = {name for query in (*ALERTS, *PANELS) for name in re.findall(r"\b(?:tripfold|process)_\w+", query.expr)}
    await deployment.verify()
    # A metric of schedules exists once there is a schedule; this one runs at New Year.
    schedule = ("schedule", "set", "drill", "--cron", "0 0 1 1 *", "--api", deployment.system.api_url)
    code, output = await deployment.system.command(*schedule)
    assert code == 0, output
    async with prometheus(deployment, directory, INTERVAL_S) as server:
        ends_at_s = time.monotonic() + METRICS_WITHIN_S
        while missing := [name for name in sorted(queried) if not await server.query(name)]:
            if time.monotonic() > ends_at_s:
                break
            await asyncio.sleep(1)
        return missing


async def drill_all(drills: Iterable[Drill], *, embedded: bool, directory: Path) -> list[Outcome]:
    """Run a deployment under load, and all drills on it one after the other."""
    config = msgspec.structs.replace(settings(), embedded_broker=embedded, seed=random.randrange(1_000_000))
    outcomes = []
    async with running_system(config, directory / "system") as system, Deployment(system) as deployment:
        await apply_topics(load_settings(system.environment))
        await deployment.start(*SERVICES)
        await deployment.ready()
        await process(system, QUIET_DATE)
        load = asyncio.create_task(use(deployment))
        try:
            missing = await missing_metrics(deployment, directory / "metrics")
            error = f"no process exports {', '.join(missing)}" if missing else ""
            outcomes.append(Outcome(fault="each queried metric is exported", alert=None, error=error))
            for number, drill in enumerate(drills):
                say(f"{drill.fault} …")
                outcomes.append(await run(drill, deployment, directory / f"drill-{number}"))
                say(row(outcomes[-1]))
                if load.done():
                    load.result()  # raises the error that ended the load; the drills prove nothing without it
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
    return outcomes


def row(outcome: Outcome) -> str:
    """Return a row of the table."""
    fired, resolved = (
        "–" if seconds is None else f"{seconds:.0f} s" for seconds in (outcome.fired_after_s, outcome.resolved_after_s)
    )
    others = ", ".join(sorted(outcome.others)) or "–"
    return (
        f"| {outcome.fault} | {outcome.alert or 'none'} | {fired} | {resolved} | {others} | {outcome.error or 'ok'} |"
    )


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the table of all drills in Markdown."""
    head = "| fault | alert | fired after | ended after | others | result |\n|---|---|---|---|---|---|"
    return "\n".join((head, *(row(outcome) for outcome in outcomes)))


def say(text: str) -> None:
    """Write a line of progress to standard error."""
    sys.stderr.write(f"alert drill: {text}\n")
    sys.stderr.flush()


async def until_stopped(drills: Iterable[Drill], *, embedded: bool, directory: Path) -> list[Outcome]:
    """Run the drills; stop them gracefully on SIGINT or SIGTERM."""
    running = asyncio.ensure_future(drill_all(drills, embedded=embedded, directory=directory))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    return await running


def main() -> int:
    """Run the drills that ``--only`` names, or all; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=("kafka", "embedded"), default="kafka")
    parser.add_argument("--only", default="", help="run only the drills whose fault contains this text")
    options = parser.parse_args()
    drills = [drill for drill in DRILLS if options.only in drill.fault]
    if not drills:
        parser.error(f"--only: no fault contains {options.only!r}")
    embedded = options.broker == "embedded"
    if not embedded and (reason := reason_unavailable()) is not None:
        sys.stderr.write(f"alert drill: {reason}; or run it on the embedded broker: make alert-drill BROKER=embedded\n")
        return 2
    directory = Path(tempfile.mkdtemp(prefix="tripfold-alert-drill-"))
    say(f"logs in {directory}")
    try:
        outcomes = asyncio.run(until_stopped(drills, embedded=embedded, directory=directory))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    sys.stdout.write(table(outcomes) + "\n")
    return 1 if any(outcome.error for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
