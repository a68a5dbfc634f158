"""Folding a file in a process of its own: for a file over which workers have died.

Run as a program, ``python -m services.ingest.apart DATE RULES`` folds its standard input and writes the result, or what
is wrong with the file, to its standard output, as JSON. It sees no credentials, and is given little memory and time: of
whatever a file does to it, this process alone dies.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

import services
from services.ingest.parser import BadRecord, FileRules, FoldedFile, InvalidTripFile, fold_trip_file

MEMORY_BYTES_MAX = 2 * 1024**3
CPU_S_MAX = 4 * 3600
RESULT_BYTES_MAX = 1024**2
READ_BYTES = 256 * 1024
_KEPT_VARIABLES = ("PATH", "PYTHON", "LANG", "LC_", "TMPDIR", "SSL_CERT", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class ParserDied(RuntimeError):
    """The process that parsed a file died of it."""


class _Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An InvalidTripFile, as it travels between the processes."""

    told: str
    reason: str
    byte_offset: int | None
    record_number: int | None
    field: str | None
    value: str | None
    bad_records: int
    reported: tuple[BadRecord, ...]


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a file: one of the two."""

    folded: FoldedFile | None = None
    refusal: _Refusal | None = None


class RefusedApart(InvalidTripFile):
    """An InvalidTripFile that was found in another process; it is told in the words of that one."""

    def __init__(self, refusal: _Refusal) -> None:
        super().__init__(
            refusal.reason,
            byte_offset=refusal.byte_offset,
            record_number=refusal.record_number,
            field=refusal.field,
            value=refusal.value,
            bad_records=refusal.bad_records,
            reported=refusal.reported,
        )
        self._told = refusal.told

    def __str__(self) -> str:
        return self._told


def fold_apart(
    read: Callable[[], bytes], *, date: str, rules: FileRules, progress: Callable[[int], None]
) -> FoldedFile:
    """Do as `fold_trip_file` does, in another process, and without telling progress.

    Raises InvalidTripFile, and ParserDied if that process ends in any other way than with a result.
    """
    del progress
    child = subprocess.Popen(  # noqa: S603  # our own interpreter and our own module
        [sys.executable, "-m", "services.ingest.apart", date, msgspec.json.encode(rules).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(services.__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name.startswith(_KEPT_VARIABLES)},
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, one way or the other
                while chunk := read():
                    child.stdin.write(chunk)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            written = child.stdout.read(RESULT_BYTES_MAX)
        finally:
            if sys.exc_info()[0] is not None:
                child.kill()
        status = child.wait()
    if status != 0:
        raise ParserDied(f"the process that parsed the file apart {_ended(status)}")
    result = msgspec.json.decode(written, type=_Result)
    if result.refusal is not None:
        raise RefusedApart(result.refusal)
    assert result.folded is not None, "a result is one of the two"
    return result.folded


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with exit code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def main(date: str, rules: str) -> None:
    """Fold standard input, and write the result to standard output."""
    _confine()

    given = msgspec.json.decode(rules, type=FileRules)
    try:
        folded = fold_trip_file(lambda: os.read(sys.stdin.fileno(), READ_BYTES), date=date, rules=given)
        result = _Result(folded=folded)
    except InvalidTripFile as error:
        result = _Result(
            refusal=_Refusal(
                told=str(error),
                reason=error.reason,
                byte_offset=error.byte_offset,
                record_number=error.record_number,
                field=error.field,
                value=error.value,
                bad_records=error.bad_records,
                reported=error.reported,
            )
        )
    sys.stdout.buffer.write(msgspec.json.encode(result))


def _confine() -> None:
    """Take away what a file could use to harm more than this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX, CPU_S_MAX))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    # Should memory run out all the same, this process is to go first.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main(*sys.argv[1:])
