"""How much memory a stream takes: as much for a large file as for a small one."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from bench.context import ROOT, null_store, served
from bench.pipe import Measured
from bench.upstream import write_block

BLOCK_BYTES = 4_000_000
GROWTH_BYTES_MAX = 8_000_000
PEAK_BYTES_MAX = 150_000_000


async def test_a_file_four_times_as_large_takes_no_more_memory(tmp_path: Path) -> None:
    """The peak of a process that streams 100 MB is that of one that streams 25 MB, and below 150 MB."""
    block = tmp_path / "block.json"
    sums = write_block(block, date="2024-05-01", size_bytes=BLOCK_BYTES)
    with served("upstream", "--block", str(block)) as (url, _pid), null_store() as store:
        environment = {**os.environ, **store.environment, "TRIPFOLD_UPSTREAM_URL": url}
        small, large = [await _streamed(blocks, environment) for blocks in (6, 24)]
    assert (small.sums, large.sums) == (sums.times(6), sums.times(24))
    assert large.peak_rss_bytes - small.peak_rss_bytes < GROWTH_BYTES_MAX
    assert large.peak_rss_bytes < PEAK_BYTES_MAX


async def _streamed(blocks: int, environment: dict[str, str]) -> Measured:
    """Stream one file in a process of its own."""
    command = (sys.executable, "-m", "bench.pipe", "--contender", "Tripfold", "--blocks", str(blocks), "--streams", "1")
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return msgspec.json.decode(out, type=Measured)
