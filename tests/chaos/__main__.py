"""Run chaos: ``python -m tests.chaos --seconds 600 [--seed N] [--broker kafka|embedded] [--report DIRECTORY]``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.apache_kafka import reason_unavailable
from tests.chaos.campaign import Plan, Report, chaos
from tests.chaos.report import markdown_of
from tests.chaos.system import Shape

EMBEDDED_SERVICES = ("api", "planner", "worker-1", "aggregate-1")


def main() -> int:
    """Run one campaign, write its report, and return 1 if anything was wrong at its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--broker", choices=("kafka", "embedded"), default="kafka")
    parser.add_argument("--report", type=Path, default=Path(".data/chaos"))
    asked = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if asked.seed is None else asked.seed
    embedded = asked.broker == "embedded"
    if not embedded and (reason := reason_unavailable()) is not None:
        sys.stderr.write(f"chaos: {reason}; or run it on the embedded broker: make chaos BROKER=embedded\n")
        return 2
    shape = Shape(embedded_broker=True, services=EMBEDDED_SERVICES, seed=seed) if embedded else Shape(seed=seed)
    directory = Path(tempfile.mkdtemp(prefix="tripfold-chaos-"))
    say(f"seed {seed}; logs in {directory}")
    plan = Plan(seconds=asked.seconds, seed=seed, shape=shape, say=say)
    try:
        report = asyncio.run(until_stopped(plan, directory))
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("stopped; nothing was judged")
        shutil.rmtree(directory, ignore_errors=True)
        return 130
    asked.report.mkdir(parents=True, exist_ok=True)
    (asked.report / "chaos.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    (asked.report / "chaos.md").write_text(markdown_of(report), encoding="utf-8")
    sys.stdout.write(markdown_of(report))
    if report.differences:
        say(f"{len(report.differences)} differences; seed {seed}; the logs stay in {directory}")
        return 1
    shutil.rmtree(directory, ignore_errors=True)
    return 0


async def until_stopped(plan: Plan, directory: Path) -> Report:
    """Run the campaign; end it in an orderly way on SIGINT or SIGTERM."""
    running = asyncio.ensure_future(chaos(plan, directory))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    return await running


def say(text: str) -> None:
    """Tell how it goes, on standard error."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"chaos: {text}{os.linesep}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
