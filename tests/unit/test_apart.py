"""Parsing a file in a process of its own: the same answer as in this one, and nothing of this one at stake."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.ingest.apart import ParserDied, fold_apart
from services.ingest.parser import DEFAULT_RULES, FileRules, FoldedFile, InvalidTripFile, fold_trip_file
from shared.file_rules import BadRecordsMax

DATE = "2024-05-01"
TRIP = b'{"departure-time":"2024-05-01T10:00:00","bus-type":"B","passengers":3,"delay":"PT1S","accident":true}'
BAD_TRIP = TRIP.replace(b"3,", b"-3,")
LENIENT = FileRules(bad_records_max=BadRecordsMax.parse("50%"), other_dates_are_bad=True)
POISON = Path(__file__).parents[1] / "poison"


def reader(body: bytes, chunk_bytes: int = 100_000) -> Callable[[], bytes]:
    """Return what gives a body chunk by chunk."""
    chunks: Iterator[bytes] = (body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes))
    return lambda: next(chunks, b"")


def unseen(_trips: int) -> None:
    return


@pytest.mark.parametrize("rules", [DEFAULT_RULES, LENIENT], ids=["strict", "lenient"])
@pytest.mark.parametrize(
    "body",
    [
        b"[" + b",".join([TRIP] * 5_000) + b"]",
        b"[" + TRIP + b"," + BAD_TRIP + b"]",
        b"[" + TRIP + b",NaN" + TRIP * 5_000 + b"]",
        b"[]",
        b"",
        b"[" + TRIP,
    ],
    ids=["good", "a bad record", "no JSON", "no trips", "empty", "cut"],
)
def test_a_file_gets_the_same_answer_apart(body: bytes, rules: FileRules) -> None:
    """The sums of a good file, and the verdict on a bad one, are word for word those of this process."""
    apart = answer(lambda: fold_apart(reader(body), date=DATE, rules=rules, progress=unseen))
    assert apart == answer(lambda: fold_trip_file(reader(body), date=DATE, rules=rules))


def answer(fold: Callable[[], FoldedFile]) -> object:
    """Return what folding a file comes to: its sums, or all that its verdict says."""
    try:
        return fold()
    except InvalidTripFile as error:
        names = ("reason", "byte_offset", "record_number", "field", "value", "bad_records", "reported")
        return str(error), [getattr(error, name) for name in names]


def test_what_kills_the_other_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that kills its parser is a fault with the signal's name, and this process lives."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(POISON), str(POISON.parents[1])]))
    body = b"[" + b",".join([TRIP] * 5_000) + b', {"POISON": 1}]'
    with pytest.raises(ParserDied, match="killed by SIGKILL"):
        fold_apart(reader(body), date=DATE, rules=DEFAULT_RULES, progress=unseen)


def test_the_other_process_sees_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither keys of the bucket nor settings are handed to the process that parses."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("TRIPFOLD_API_KEYS", "secret")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif any('secret' in value for value in os.environ.values()): os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert fold_apart(reader(b"[]"), date=DATE, rules=DEFAULT_RULES, progress=unseen).records == 0


def test_a_stream_that_fails_ends_the_other_process() -> None:
    """What reading raises is passed on, and no process is left behind."""

    def failing() -> bytes:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fold_apart(failing, date=DATE, rules=DEFAULT_RULES, progress=unseen)
