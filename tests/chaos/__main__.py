"""Run chaos: ``python -m tests.chaos [--seconds 600] [--seed N] [--broker kafka|embedded] [--brokers 3]``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.apache_kafka import reason_unavailable
from tests.chaos.campaign import CampaignConfig, run_campaign
from tests.chaos.report import CampaignReport, markdown_of
from tests.chaos.system import SystemConfig

DATES = 4
CLOCK_LIBRARY = "*/faketime/libfaketimeMT.so.1"
"""Where Debian's package libfaketime has it, below /usr/lib."""
EMBEDDED_SERVICES = ("api", "planner", "worker-1", "aggregate-1")


def main() -> int:
    """Run one campaign and write its report; return 1 if the final checks find a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--broker", choices=("kafka", "embedded"), default="kafka")
    parser.add_argument("--brokers", type=int, default=3, help="brokers of Apache Kafka; each needs 0.5 GB of memory")
    parser.add_argument("--pace", type=float, default=1, help="pauses between faults, so many times longer")
    parser.add_argument("--report", type=Path, default=Path(".data/chaos"))
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    embedded = options.broker == "embedded"
    if not embedded and (reason := reason_unavailable()) is not None:
        sys.stderr.write(f"chaos: {reason}; or run it on the embedded broker: make chaos BROKER=embedded\n")
        return 2
    config = SystemConfig(
        seed=seed, dates=latest_dates(), brokers=options.brokers, clock_library=clock_library(), upgrades=True
    )
    if embedded:
        config = msgspec.structs.replace(config, embedded_broker=True, services=EMBEDDED_SERVICES)
    directory = Path(tempfile.mkdtemp(prefix="tripfold-chaos-"))
    say(f"seed {seed}; logs in {directory}")
    campaign = CampaignConfig(seconds=options.seconds, seed=seed, system=config, pace=options.pace, say=say)
    try:
        report = asyncio.run(until_stopped(campaign, directory))
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("stopped before the final checks")
        shutil.rmtree(directory, ignore_errors=True)
        return 130
    options.report.mkdir(parents=True, exist_ok=True)
    (options.report / "chaos.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    (options.report / "chaos.md").write_text(markdown_of(report), encoding="utf-8")
    sys.stdout.write(markdown_of(report))
    if report.differences:
        say(f"{len(report.differences)} differences; seed {seed}; the logs stay in {directory}")
        return 1
    shutil.rmtree(directory, ignore_errors=True)
    return 0


def latest_dates() -> tuple[str, ...]:
    """Return the latest dates, which a schedule can process."""
    today = dt.datetime.now(dt.UTC).date()
    return tuple(str(today - dt.timedelta(days=days)) for days in range(DATES, 0, -1))


def clock_library() -> str | None:
    """Return where libfaketime is, or None if it is not installed."""
    found = next(Path("/usr/lib").glob(CLOCK_LIBRARY), None)
    if found is None:
        say("no clock jumps: install Debian's package libfaketime")
        return None
    return str(found)


async def until_stopped(campaign: CampaignConfig, directory: Path) -> CampaignReport:
    """Run the campaign; stop it gracefully on SIGINT or SIGTERM."""
    running = asyncio.ensure_future(run_campaign(campaign, directory))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    return await running


def say(text: str) -> None:
    """Write a line of progress to standard error."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"chaos: {text}{os.linesep}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
