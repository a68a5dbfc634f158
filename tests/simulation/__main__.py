"""Runs simulations for a time, or a number of them: `make simulation`."""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time

from tests.simulation.runs import run_seeds


def main() -> int:
    """Run simulations, print a report, and return 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seconds", type=float, help="begin no simulation after this time")
    parser.add_argument("--histories", type=int, help="run so many simulations at most")
    parser.add_argument("--seed", type=int, help="seed of the first one; the next ones follow (default: random)")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the simulations")
    arguments = parser.parse_args()
    first = random.SystemRandom().randrange(1_000_000_000) if arguments.seed is None else arguments.seed
    until_s = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    sys.stdout.write(f"first seed: {first}\n")
    sys.stdout.flush()
    seeds = itertools.islice(itertools.count(first), arguments.histories)
    report = run_seeds(seeds, workers=arguments.workers, until_s=until_s)
    sys.stdout.write(f"{report}\n")
    return 1 if report.failure else 0


if __name__ == "__main__":
    sys.exit(main())
