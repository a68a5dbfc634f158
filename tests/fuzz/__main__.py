"""Fuzz every target with atheris, one after the other, in equal shares of the time.

Found inputs stay in ``.data/fuzz``, so a later run continues from them. Exits with 1 if a target fails, after it has
printed how to repeat that.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from tests import ROOT
from tests.fuzz.targets import TARGETS

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
FOUND = ROOT / ".data" / "fuzz"
INPUT_BYTES_MAX = 4_096
SLOW_S = 5

_FINAL = re.compile(r"^#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)
_ANY = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


def main() -> None:
    """Fuzz the chosen targets."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="the time of all targets together")
    parser.add_argument("--only", choices=TARGETS, action="append", help="a target; repeat it for more than one")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="call the target of --only with this input only")
    chosen = parser.parse_args()
    names = chosen.only or list(TARGETS)
    if chosen.replay:
        for name in names:
            TARGETS[name](chosen.replay.read_bytes())
        return
    failed = [name for name in names if not fuzz(name, max(1, chosen.seconds // len(names)))]
    if failed:
        sys.exit(1)


def fuzz(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own; print what it did, and return whether it found nothing."""
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    corpus = CORPUS / name
    command = [
        *(sys.executable, "-m", "tests.fuzz.process", name, str(found), str(corpus)),
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-timeout={SLOW_S}",
        f"-artifact_prefix={FOUND}/{name}-",
        f"-dict={ROOT / 'tests' / 'fuzz' / 'dictionary.txt'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    log = done.stderr + done.stdout
    last = (_FINAL.findall(log) or _ANY.findall(log) or [("0", "0", "0", "0")])[-1]
    executions, edges, features, inputs = map(int, last)
    print(
        f"{name}: {executions:,} executions, {edges:,} edges, {features:,} features, {inputs:,} inputs, "
        f"{'nothing found' if not done.returncode else 'FAILED'}",
        flush=True,
    )
    if done.returncode:
        (FOUND / f"{name}.log").write_text(log, encoding="utf-8")
        print("\n".join(log.splitlines()[-40:]))
        artifacts = re.findall(r"Test unit written to (\S+)", log)
        for artifact in artifacts:
            print(f"Repeat it: python -m tests.fuzz --only {name} --replay {artifact}")
    return not done.returncode


if __name__ == "__main__":
    main()
