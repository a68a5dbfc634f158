"""Measure how fast Tripfold totals a trip file, next to other parsers. Run it as `python -m bench.parsing`.

Each contender totals the same file to the same five numbers: trips, passengers, accidents, total delay, trips on other
dates. It does so several times, each time in a process of its own; the table gives the median. CPU time is that of
parsing alone, without starting Python or importing. Peak memory is that of the whole process. The row `imports only`
has the memory in use before a byte is read.

Bias: the file is as the reference upstream writes it, without white space and in one order of fields. The batch path
was made for such files. Each trip is random, so that no cache is favoured. Tripfold validates every field. The peers
check what their types check, and use the same rule for delays as Tripfold, behind a cache; DuckDB only reads whole
seconds. The file is in the page cache for all.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec

from bench.tables import print_table

DATE: Final = "2024-05-01"
CHUNK_BYTES: Final = 64 * 1024
ROOT: Final = Path(__file__).resolve().parent.parent

Sums = tuple[int, int, int, int, int]
NOTHING: Final[Sums] = (0, 0, 0, 0, 0)


def main() -> None:
    """Write the file, run every contender and print the table."""
    parser = argparse.ArgumentParser(description="Measure how fast a trip file is folded.")
    parser.add_argument("--trips", type=int, help="default: 1,000,000, with --quick 200,000")
    parser.add_argument("--runs", type=int, default=3, help="processes for each contender; the median counts")
    parser.add_argument("--quick", action="store_true", help="a smaller file")
    parser.add_argument("--only", action="append", choices=list(CONTENDERS), help="leave out the others")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help="fold this file rather than one made for the purpose")
    options = parser.parse_args()
    if options.contender:
        print(msgspec.json.encode(_measure_here(CONTENDERS[options.contender], options.file)).decode())
        return
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or Path(folder) / "trips.json"
        if not options.file:
            write_trip_file(file, trips=options.trips or (200_000 if options.quick else 1_000_000))
        results = _compare(options.only or list(CONTENDERS), file, options.runs)
    _print_table(results)
    if options.json:
        options.json.write_text(json.dumps(msgspec.to_builtins(results), indent=2) + "\n")


def write_trip_file(path: Path, *, trips: int, seed: int = 1) -> None:
    """Write a file of so many trips, as the reference upstream does; the same bytes for the same seed."""
    dice = random.Random(seed)
    with path.open("w") as out:
        out.write("[")
        for number in range(trips):
            time_of_day = f"{dice.randrange(24):02d}:{dice.randrange(60):02d}:{dice.randrange(60):02d}"
            accident = "true" if dice.random() < 0.01 else "false"
            out.write(
                f'{"," if number else ""}{{"departure-time":"{DATE}T{time_of_day}",'
                f'"bus-type":"BUS-{dice.randrange(1000)}","passengers":{dice.randrange(100)},'
                f'"delay":"PT{dice.randrange(7200)}S","accident":{accident}}}'
            )
        out.write("]")


def fold_with_batch_path(path: Path) -> Sums:
    """Fold with `total_trip_file`, as the worker does."""
    return _fold_with_tripfold(path, force_strict=False)


def fold_with_strict_path(path: Path) -> Sums:
    """Fold with the path that takes over when the fast one declines."""
    return _fold_with_tripfold(path, force_strict=True)


def _fold_with_tripfold(path: Path, *, force_strict: bool) -> Sums:
    from services.ingest.parsing.parser import total_trip_file  # noqa: PLC0415 - each process imports its contender alone

    with path.open("rb", buffering=0) as file:
        folded = total_trip_file(lambda: file.read(CHUNK_BYTES), date=DATE, force_strict=force_strict)
    assert folded.strict_path_records == (folded.records if force_strict else 0)
    sums = folded.contribution
    return sums.trips, sums.passengers, sums.accidents, sums.delay_total_ms, folded.trips_on_other_dates


def fold_with_ijson_items(path: Path) -> Sums:
    """Fold with the usual loop over `ijson.items`."""
    import ijson  # noqa: PLC0415 - as above

    backend = ijson.get_backend("yajl2_c")
    with path.open("rb", buffering=0) as file:
        return _fold_records(backend.items(file, "item", buf_size=CHUNK_BYTES))


def fold_with_json_loads(path: Path) -> Sums:
    """Fold with the standard library, the whole file in memory."""
    return _fold_records(json.loads(path.read_bytes()))


def _fold_records(records: object) -> Sums:
    from services.ingest.parsing.trips import delay_ms  # noqa: PLC0415 - as above

    delay = lru_cache(maxsize=65_536)(delay_ms)
    trips = passengers = accidents = delay_total_ms = on_other_dates = 0
    for record in records:  # type: ignore[attr-defined] # parsed JSON: checking it is part of what is compared
        trips += 1
        passengers += record["passengers"]
        accidents += record["accident"]
        delay_total_ms += delay(record["delay"])
        on_other_dates += not record["departure-time"].startswith(DATE)
    return trips, passengers, accidents, delay_total_ms, on_other_dates


def fold_with_duckdb(path: Path) -> Sums:
    """Fold with DuckDB on one thread, the types given."""
    import duckdb  # noqa: PLC0415 - as above

    connection = duckdb.connect(config={"threads": 1})
    [row] = connection.execute(
        """
        select count(*), sum(passengers), sum(accident::int),
               sum(regexp_extract(delay, 'PT(-?[0-9]+)S', 1)::bigint) * 1000,
               sum(("departure-time"::date <> ?::date)::int)
        from read_json(?, format = 'array', columns = {
            'departure-time': 'TIMESTAMP', 'bus-type': 'VARCHAR', 'passengers': 'INTEGER',
            'delay': 'VARCHAR', 'accident': 'BOOLEAN'})
        """,
        [DATE, str(path)],
    ).fetchall()
    trips, passengers, accidents, delay_total_ms, on_other_dates = (int(value) for value in row)
    return trips, passengers, accidents, delay_total_ms, on_other_dates


def only_import(_path: Path) -> Sums:
    """Import what the batch path needs, and fold nothing."""
    import services.ingest.parsing.parser  # noqa: F401, PLC0415 - as above

    return NOTHING


CONTENDERS: Final[dict[str, Callable[[Path], Sums]]] = {
    "batch path": fold_with_batch_path,
    "strict path": fold_with_strict_path,
    "ijson.items": fold_with_ijson_items,
    "json.loads": fold_with_json_loads,
    "DuckDB, one thread": fold_with_duckdb,
    "imports only": only_import,
}


class Measured(msgspec.Struct, frozen=True):
    """One turn of one contender."""

    sums: Sums
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int


class Result(msgspec.Struct, frozen=True):
    """The medians of one contender's turns."""

    name: str
    runs: int
    file_bytes: int
    sums: Sums
    mb_per_wall_s: float
    mb_per_cpu_s: float
    cpu_s_per_gb: float
    peak_rss_mb: float


def _measure_here(fold: Callable[[Path], Sums], file: Path) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        warm_up = Path(folder) / "one.json"
        write_trip_file(warm_up, trips=1)
        fold(warm_up)
    wall, cpu = time.perf_counter(), time.process_time()
    sums = fold(file)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return Measured(sums=sums, wall_s=wall_s, cpu_s=cpu_s, peak_rss_bytes=_peak_rss_bytes())


def _peak_rss_bytes() -> int:
    # A child's ru_maxrss begins at its parent's size, so ask the kernel for this process's own where it says.
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(match[1]) if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _compare(names: list[str], file: Path, runs: int) -> list[Result]:
    """Let the contenders take turns, so that a busy minute of the machine is nobody's alone."""
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(runs):
        for name in list(measured):
            command = [sys.executable, "-m", "bench.parsing", "--contender", name, "--file", str(file.resolve())]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if ran.returncode:
                print(f"{name}: left out, {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                del measured[name]
            else:
                measured[name].append(msgspec.json.decode(ran.stdout, type=Measured))
    size = file.stat().st_size
    return [_summed_up(name, size, turns) for name, turns in measured.items()]


def _summed_up(name: str, size: int, turns: list[Measured]) -> Result:
    cpu_s = statistics.median(turn.cpu_s for turn in turns)
    return Result(
        name=name,
        runs=len(turns),
        file_bytes=size,
        sums=turns[0].sums,
        mb_per_wall_s=size / 1e6 / statistics.median(turn.wall_s for turn in turns),
        mb_per_cpu_s=size / 1e6 / cpu_s,
        cpu_s_per_gb=cpu_s * 1e9 / size,
        peak_rss_mb=statistics.median(turn.peak_rss_bytes for turn in turns) / 1e6,
    )


def _print_table(results: list[Result]) -> None:
    columns = ("", "MB/s", "MB per CPU s", "CPU s per GB", "peak RSS, MB")
    rows: list[tuple[object, ...]] = [
        (result.name, None, None, None, round(result.peak_rss_mb))
        if result.sums == NOTHING
        else (result.name, result.mb_per_wall_s, result.mb_per_cpu_s, result.cpu_s_per_gb, round(result.peak_rss_mb))
        for result in results
    ]
    print_table(f"Parsing: a file of {results[0].file_bytes / 1e6:.0f} MB", columns, rows)
    different = {result.sums for result in results} - {NOTHING}
    if len(different) > 1:
        print(f"the contenders disagree: {different}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
