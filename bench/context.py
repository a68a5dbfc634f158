"""Servers for the benchmarks: the upstream, and S3 as SeaweedFS or as a sink, each in its own process."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

ROOT: Final = Path(__file__).resolve().parent.parent
END_DEADLINE_S: Final = 10.0


class Store(msgspec.Struct, frozen=True):
    """An S3 to measure against: its name, the environment that leads to it, and its process."""

    name: str
    environment: dict[str, str]
    pid: int


def end_in_order() -> None:
    """Let SIGTERM end this process as an exception does, so that it ends what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def served(module: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Run a server of this package; yield its URL, which it prints first, and its process."""
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"bench.{module} did not start")
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(END_DEADLINE_S)


@contextlib.contextmanager
def null_store() -> Iterator[Store]:
    """Run an S3 that throws trip files away."""
    with served("null_s3") as (url, pid):
        environment = {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "asks",
            "TRIPFOLD_S3_ENDPOINT_URL": url,
            "TRIPFOLD_S3_BUCKET": "bench",
        }
        yield Store("a sink", environment, pid)


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[Store]:
    """Run SeaweedFS, and the embedded Kafka, on a folder."""
    from tripfold.local.embedded import embedded_services  # noqa: PLC0415 - who only measures has nothing of Tripfold

    with embedded_services(folder) as services:
        yield Store("SeaweedFS", services.environment(), services.supervisor.pid("s3"))


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has taken, 0 where /proc does not say."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return 0.0
    user, system = path.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes(pid: int | None = None) -> int:
    """Return the most memory that a process has had, by default this one."""
    # A child's ru_maxrss begins at its parent's size, so ask the kernel for the process's own where it says.
    status = Path(f"/proc/{pid or 'self'}/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(match[1]) if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
