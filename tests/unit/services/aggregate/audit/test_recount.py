"""The audit parser: it totals raw objects independently of the parser of the workers."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from services.aggregate.audit.recount import AuditParseError, AuditParser
from tests.fakes.bucket import DAY
from tests.fakes.builders import trip_record


def count(body: bytes, chunk_bytes: int = 5) -> tuple[int, int, int, int, int]:
    counter = AuditParser(str(DAY))
    for begin in range(0, len(body), chunk_bytes):
        counter.feed(body[begin : begin + chunk_bytes])
    read = counter.end()
    return read.trips, read.passengers, read.accidents, read.delay_total_ms, read.trips_on_other_dates


@pytest.mark.parametrize(
    ("written", "delay_ms"),
    [
        ("PT4080S", 4_080_000),
        ("-PT1M30.5S", -90_500),
        ("PT-4080S", -4_080_000),
        ("-PT-1S", 1_000),
        ("P1W", 604_800_000),
        ("P1DT2H", 93_600_000),
        ("PT0,0005S", 0),
        ("PT0.0015S", 2),
        ("PT-0.0025S", -2),
    ],
)
def test_the_audit_parser_reads_delays(written: str, delay_ms: int) -> None:
    """Weeks, signs, fractions and rounding half to even follow the documentation."""
    assert count(json.dumps([trip_record(written)]).encode()) == (1, 3, 1, delay_ms, 0)
    assert round(Fraction(delay_ms)) == delay_ms


@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 100_000])
def test_the_audit_parser_reads_a_file_in_any_chunks(chunk_bytes: int) -> None:
    """A file with a byte order mark, white space and nested values has the same figures in any chunks."""
    records = [trip_record(stops=[{"name": "]}"}, [1]]), trip_record(departure="2024-05-02T00:10"), trip_record()]
    body = b"\xef\xbb\xbf \n" + json.dumps(records, indent=1, ensure_ascii=False).encode() + b"\n "
    assert count(body, chunk_bytes) == (3, 9, 3, 3_000, 1)


@pytest.mark.parametrize("body", [b"", b"[", b"{}", b'[{"a"', b"[] x", b"[\xff]", b"[1", b"null", b"[],"])
def test_the_audit_parser_rejects_other_files(body: bytes) -> None:
    """A truncated file, or one of another form, raises an error, and no part of it is counted."""
    with pytest.raises(AuditParseError):
        count(body)


def test_the_audit_parser_counts_bad_records_separately() -> None:
    """A value that is no trip, or a trip that breaks a rule, is left out of the sums and reported."""
    bad: list[object] = [
        1,
        {},
        *(trip_record(delay) for delay in ("P1Y", "P", "P1DT", "PT1.5H1M", "P367D")),
        *(trip_record(departure=departure) for departure in ("2024-02-30T01:00", "2024-05-01")),
        trip_record(passengers=True),
        trip_record() | {"bus-type": 5},
    ]
    counter = AuditParser(str(DAY))
    counter.feed(json.dumps([trip_record(), *bad, trip_record()]).encode())
    recount = counter.end()
    assert (recount.trips, recount.bad_records, recount.first_bad[:8]) == (2, len(bad), "record 2")


def test_an_empty_array_counts_nothing() -> None:
    """A file may have no trips."""
    assert count(b" [ ] ") == (0, 0, 0, 0, 0)
