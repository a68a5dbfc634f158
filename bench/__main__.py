"""Run every benchmark, one after the other: `make bench`, or `python -m bench`.

A benchmark is a module of this package. It also runs by itself::

    python -m bench.NAME [--quick] [--runs N] [its own options] [--json FILE]

A benchmark prints tables in Markdown (`bench.tables`) and writes all results to FILE. Its docstring says what it
measures and where it is biased. It exits with a code other than 0 if its contenders disagree or a dependency failed.
Peers that are not installed are left out, and named on standard error. To add a benchmark, write the module and list
it in `BENCHMARKS`. Each runs in a process of its own, so that none is measured with another's memory.
All together take less than 15 minutes on two cores that do nothing else. So DuckDB reads the summaries of one month,
and the table says which row is extrapolated from it. `bench.load` takes more than an hour, so it is not listed, and
runs only by itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

BENCHMARKS: Final = (
    "parsing",
    "pipe",
    "worker",
    "slow_cities",
    "fairness",
    "sizing",
    "reader",
    "fold",
)  # fmt: skip  # one a line: two people can add theirs


def main() -> None:
    """Run the chosen benchmarks; print their tables, and keep them beside the results."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Run the benchmarks.",
        epilog="Any other option is passed on to each benchmark that runs: --only pipe --runs 9",
    )
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="leave out the others")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: for a look, not for numbers")
    parser.add_argument(
        "--data-dir", type=Path, default=ROOT / ".data" / "bench", help="where NAME.json and report.md go"
    )
    options, passed_on = parser.parse_known_args()
    options.data_dir.mkdir(parents=True, exist_ok=True)
    if options.quick:
        passed_on.append("--quick")
    failed = []
    began_s = time.monotonic()
    with (options.data_dir / "report.md").open("w") as report:
        _say(report, f"Measured with {_machine()}.\n")
        for name in options.only or BENCHMARKS:
            command = [sys.executable, "-m", f"bench.{name}", "--json", str(options.data_dir / f"{name}.json")]
            with subprocess.Popen([*command, *passed_on], cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
                assert running.stdout is not None
                for line in running.stdout:
                    _say(report, line)
            if running.returncode:
                failed.append(name)
        _say(report, f"\nThe benchmarks took {(time.monotonic() - began_s) / 60:.1f} minutes.\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _say(report: object, text: str) -> None:
    for out in (sys.stdout, report):
        print(text, end="", file=out, flush=True)  # type: ignore[call-overload] # both are text files


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load average {os.getloadavg()[0]:.1f} before it began" if hasattr(os, "getloadavg") else ""
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {cores} cores{load}"


if __name__ == "__main__":
    main()
