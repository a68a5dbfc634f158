"""Measure how fast a file goes from the upstream into S3, with and without parsing: `python -m bench.pipe`.

Each contender takes one file, or several at once, through the worker's own modules: the HTTP client of the upstream,
the stream, the upload. They differ in the work of the stream's thread: `pass-through` hashes the bytes, `Tripfold`
hashes, validates and totals, the peers hash and total with another parser. Each turn is a process of its own, and
contenders take turns. The table gives medians of wall time, and of that process's CPU time and peak memory, with Python
and all libraries in it. `held` is the longest time for which the event loop was blocked. A task that should run every
5 ms measures it; on a machine with other work it includes the waiting for a core.

The benchmark leaves out one step after the other to show the CPU time of each.

Bias: everything runs on this machine, so S3 and the upstream take processor time from the worker. Against SeaweedFS
the store limits both contenders alike; the sink shows what the pipe itself can do. The file repeats a block of 32 MB of
trips as the reference upstream writes them, from the page cache. The peers get files of a quarter of the size,
because `json.loads` keeps a whole file in memory, and they do not check what Tripfold validates.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.context import ROOT, Store, cpu_s, end_in_order, null_store, peak_rss_bytes, seaweedfs, served
from bench.parsing import fold_with_duckdb
from bench.tables import print_table
from bench.upstream import BLOCK_BYTES, Sums, city_id, write_block

DATE: Final = "2024-05-01"
LOOK_INTERVAL_S: Final = 0.005
STREAMS: Final = (1, 2, 4)

Fold = Callable[..., Any]


def main() -> None:
    """Run the contenders against both stores and print the tables."""
    parser = argparse.ArgumentParser(description="Measure how fast files go from the upstream into S3.")
    parser.add_argument("--bytes", type=float, help="size of a file; default: 5e8, with --quick 1e8")
    parser.add_argument("--runs", type=int, help="turns of each contender; the median counts; default: 3, --quick 1")
    parser.add_argument("--quick", action="store_true", help="smaller files, one turn each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        measured = _measure_here(options.contender, blocks=options.blocks, streams=options.streams)
        print(msgspec.json.encode(measured).decode())
        return
    end_in_order()
    blocks = max(1, round((options.bytes or (1e8 if options.quick else 5e8)) / BLOCK_BYTES))
    with tempfile.TemporaryDirectory() as folder:
        block = Path(folder) / "block.json"
        sums = write_block(block, date=DATE)
        with served("upstream", "--block", str(block)) as (url, _pid):
            bench = _Bench(url, sums, options.runs or (1 if options.quick else 3))
            with seaweedfs(Path(folder) / "embedded") as store:
                bench.compare(store, ["pass-through", "Tripfold"], blocks)
            with null_store() as store:
                bench.compare(store, [*STEPS, "Tripfold"], blocks)
                bench.compare(store, list(PEERS), max(1, blocks // 4))
                for streams in STREAMS[1:]:
                    bench.compare(store, ["Tripfold"], max(1, blocks // streams), streams=streams)
    _print(bench.results)
    if options.json:
        options.json.write_text(json.dumps(msgspec.to_builtins(bench.results), indent=2) + "\n")


class Measured(msgspec.Struct, frozen=True):
    """One turn of one contender; ``sums`` are missing if it does not fold."""

    size_bytes: int
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    held_s: float
    sums: Sums | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The medians of one contender's turns against one store."""

    store: str
    name: str
    runs: int
    streams: int
    size_bytes: int
    wall_s: float
    mb_per_s: float
    cpu_s_per_gb: float
    store_cpu_s_per_gb: float
    peak_rss_mb: float
    held_ms_max: float


class _Bench:
    """Runs contenders in processes of their own, and keeps their medians."""

    def __init__(self, upstream_url: str, sums: Sums, runs: int) -> None:
        self._upstream_url = upstream_url
        self._sums = sums
        self._runs = runs
        self.results: list[Result] = []

    def compare(self, store: Store, names: list[str], blocks: int, *, streams: int = 1) -> None:
        """Let contenders take turns at files of so many blocks. Raises AssertionError if one adds up wrongly."""
        turns: dict[str, list[Measured]] = {name: [] for name in names}
        store_cpu_s: dict[str, list[float]] = {name: [] for name in names}
        environment = {**os.environ, **store.environment, "TRIPFOLD_UPSTREAM_URL": self._upstream_url}
        # In a process of its own, because a worker does not load what creates a bucket.
        apply_bucket = [sys.executable, "-m", "tripfold", "bucket", "apply"]
        subprocess.run(apply_bucket, cwd=ROOT, env=environment, capture_output=True, check=True)
        for _ in range(self._runs):
            for name in list(turns):
                command = [sys.executable, "-m", "bench.pipe", "--contender", name]
                command += ["--blocks", str(blocks), "--streams", str(streams)]
                began_s = cpu_s(store.pid)
                ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
                if ran.returncode:
                    print(f"{name}: left out, {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    del turns[name]
                    continue
                measured = msgspec.json.decode(ran.stdout, type=Measured)
                assert measured.sums in {None, self._sums.times(blocks * streams)}, f"{name}: {measured.sums}"
                turns[name].append(measured)
                store_cpu_s[name].append(cpu_s(store.pid) - began_s)
        # Only a parser that was replaced adds nothing up.
        for name, measured_turns in turns.items():
            sums = measured_turns[0].sums
            assert (sums is None) == (name in STEPS), f"{name} totals what it should not, or nothing"
            self.results.append(_summed_up(store.name, name, streams, measured_turns, store_cpu_s[name]))


def _summed_up(store: str, name: str, streams: int, turns: list[Measured], store_cpu_s: list[float]) -> Result:
    size_bytes = turns[0].size_bytes
    wall_s = statistics.median(turn.wall_s for turn in turns)
    return Result(
        store=store,
        name=name,
        runs=len(turns),
        streams=streams,
        size_bytes=size_bytes,
        wall_s=wall_s,
        mb_per_s=size_bytes / 1e6 / wall_s,
        cpu_s_per_gb=statistics.median(turn.cpu_s for turn in turns) * 1e9 / size_bytes,
        store_cpu_s_per_gb=statistics.median(store_cpu_s) * 1e9 / size_bytes,
        peak_rss_mb=statistics.median(turn.peak_rss_bytes for turn in turns) / 1e6,
        held_ms_max=1000 * max(turn.held_s for turn in turns),
    )


def _measure_here(name: str, *, blocks: int, streams: int) -> Measured:
    import uvloop  # noqa: PLC0415 - loaded, as all of Tripfold here, in the contenders' processes alone

    from services.ingest.worker.streaming import tune_allocator  # noqa: PLC0415 - as above

    tune_allocator()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_carry(CONTENDERS[name], blocks=blocks, streams=streams))


async def _carry(fold: Fold | None, *, blocks: int, streams: int) -> Measured:
    """Take files from the upstream into S3, and the time."""
    from services.ingest.parsing.parser import total_trip_file  # noqa: PLC0415 - as above
    from services.ingest.upstream.circuit_breaker import CircuitBreaker  # noqa: PLC0415 - as above
    from services.ingest.upstream.client import HttpUpstream  # noqa: PLC0415 - as above
    from services.ingest.worker import streaming  # noqa: PLC0415 - as above
    from shared.runtime.health import Health  # noqa: PLC0415 - as above
    from shared.runtime.retry import Retrier  # noqa: PLC0415 - as above
    from shared.runtime.settings import load_settings  # noqa: PLC0415 - as above
    from shared.storage.s3 import S3Store  # noqa: PLC0415 - as above

    settings = load_settings()
    circuit = CircuitBreaker(Retrier(health=Health(), wait_max_s=1))
    uploads = fold is not _only_receive
    hashes = fold is not _only_receive and fold is not _only_upload

    async def carry_one(number: int) -> tuple[int, Any]:
        date = dt.date.fromisoformat(DATE)
        async with upstream.download(str(city_id(blocks=blocks, number=number)), date, None) as download:
            assert download.chunks is not None
            upload = store.upload(f"raw/date={DATE}/city={number}/{uuid.uuid4().hex}.json")
            try:
                if hashes:
                    streamed = await streaming.stream_file(
                        download.chunks,
                        upload,
                        date=DATE,
                        progress=streaming.StreamProgress(),
                        threads=threads,
                        parse=fold or total_trip_file,
                    )
                    await upload.complete()
                    return streamed.size_bytes, streamed.totals
                size_bytes = 0
                async for chunk in download.chunks:
                    size_bytes += len(chunk)
                    if uploads:
                        await upload.write(chunk)
                if uploads:
                    await upload.complete()
                return size_bytes, None
            finally:
                await upload.abort()

    with ThreadPoolExecutor(streams) as threads:
        async with S3Store(settings) as store, HttpUpstream(settings, circuit) as upstream:
            held = _Held()
            looking = asyncio.create_task(held.look())
            wall, cpu = time.perf_counter(), time.process_time()
            carried = await asyncio.gather(*map(carry_one, range(streams)))
            wall_s, process_s = time.perf_counter() - wall, time.process_time() - cpu
            looking.cancel()
    return Measured(
        size_bytes=sum(size_bytes for size_bytes, _ in carried),
        wall_s=wall_s,
        cpu_s=process_s,
        peak_rss_bytes=peak_rss_bytes(),
        held_s=held.longest_s,
        sums=_sums_of([folded for _, folded in carried]),
    )


def _sums_of(folded: list[Any]) -> Sums | None:
    if folded[0] is None:
        return None
    all_sums = [one if isinstance(one, Sums) else _sums(one.contribution) for one in folded]
    return Sums(*(sum(values) for values in zip(*map(msgspec.structs.astuple, all_sums), strict=True)))


def _sums(contribution: Any) -> Sums:
    return Sums(contribution.trips, contribution.passengers, contribution.accidents, contribution.delay_total_ms)


class _Held:
    """How long the event loop is held at the most."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def look(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LOOK_INTERVAL_S
            await asyncio.sleep(LOOK_INTERVAL_S)
            self.longest_s = max(self.longest_s, loop.time() - due_s)


def _only_receive(_read: Callable[[], bytes], **_: Any) -> None:
    raise AssertionError("without hashing there is no thread to read in")


def _only_upload(_read: Callable[[], bytes], **_: Any) -> None:
    raise AssertionError("without hashing there is no thread to read in")


def _only_hash(read: Callable[[], bytes], **_: Any) -> None:
    for _chunk in _chunks(read):
        pass


def _with_ijson(read: Callable[[], bytes], **_: Any) -> Sums:
    import ijson  # noqa: PLC0415 - each process imports its contender alone

    class File:
        def read(self, size_bytes: int) -> bytes:
            return read() if size_bytes else b""

    return _summed(ijson.get_backend("yajl2_c").items(File(), "item"))


def _with_json_loads(read: Callable[[], bytes], **_: Any) -> Sums:
    return _summed(json.loads(b"".join(_chunks(read))))


def _with_duckdb(read: Callable[[], bytes], **_: Any) -> Sums:
    import duckdb  # noqa: F401, PLC0415 - as above

    with tempfile.NamedTemporaryFile() as file:
        file.writelines(_chunks(read))
        file.flush()
        return Sums(*fold_with_duckdb(Path(file.name))[:4])


def _chunks(read: Callable[[], bytes]) -> Iterator[bytes]:
    return iter(read, b"")


def _summed(records: Any) -> Sums:
    trips = passengers = accidents = delay_total_s = 0
    for record in records:
        trips += 1
        passengers += record["passengers"]
        accidents += record["accident"]
        delay_total_s += int(record["delay"].removeprefix("PT").removesuffix("S"))
    return Sums(trips, passengers, accidents, delay_total_s * 1000)


STEPS: Final[dict[str, Fold]] = {
    "receive alone": _only_receive,
    "receive, upload": _only_upload,
    "pass-through": _only_hash,
}
PEERS: Final[dict[str, Fold]] = {
    "ijson.items": _with_ijson,
    "json.loads": _with_json_loads,
    "DuckDB, downloaded": _with_duckdb,
}
CONTENDERS: Final[dict[str, Fold | None]] = {**STEPS, **PEERS, "Tripfold": None}


def _print(results: list[Result]) -> None:
    columns = ("", "GB", "MB/s", "of pass-through", "CPU s per GB", "S3's CPU s per GB", "peak RSS, MB", "held, ms")
    for store in dict.fromkeys(result.store for result in results):
        alone = [one for one in results if one.store == store and one.streams == 1]
        [through] = [one for one in alone if one.name == "pass-through"]
        rows = [
            (
                one.name,
                one.size_bytes / 1e9,
                one.mb_per_s,
                one.mb_per_s / through.mb_per_s,
                one.cpu_s_per_gb,
                one.store_cpu_s_per_gb,
                round(one.peak_rss_mb),
                round(one.held_ms_max),
            )
            for one in alone
        ]
        print_table(f"End to end: HTTP to S3 ({store}), one stream", columns, rows)
    sink = {(one.name, one.streams): one for one in results if one.store == "a sink"}
    _print_steps({name: one.cpu_s_per_gb for (name, streams), one in sink.items() if streams == 1})
    side_by_side = [sink["Tripfold", streams] for streams in STREAMS]
    print_table(
        "Streams side by side in one worker (a sink)",
        ("streams", "GB each", "MB/s in all", "CPU s per GB", "peak RSS, MB", "held, ms"),
        [
            (
                one.streams,
                one.size_bytes / 1e9 / one.streams,
                one.mb_per_s,
                one.cpu_s_per_gb,
                round(one.peak_rss_mb),
                round(one.held_ms_max),
            )
            for one in side_by_side
        ],
    )


def _print_steps(cpu_s_per_gb: dict[str, float]) -> None:
    names = ("receive alone", "receive, upload", "pass-through", "Tripfold")
    steps = ("receive", "upload", "hash", "parse and fold")
    taken = [cpu_s_per_gb[name] for name in names]
    costs = [after - before for before, after in zip([0.0, *taken], taken, strict=False)]
    print_table(
        "Where the processor time goes (a sink)",
        ("step", "CPU s per GB", "share, %"),
        [(step, cost, round(100 * cost / taken[-1])) for step, cost in zip(steps, costs, strict=True)],
    )


if __name__ == "__main__":
    main()
