"""One trip file in, one contribution or one verdict out: the documents that are odd on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services.ingest.parsing.bad_records import BAD_RECORDS_REPORTED_MAX
from services.ingest.parsing.parser import (
    DEFAULT_LIMITS,
    DEFAULT_RULES,
    FileTotals,
    InvalidTripFile,
    ParserLimits,
    TooManyBadRecords,
    total_trip_file,
)
from shared.domain.contribution import FIGURE_MAX, Contribution
from shared.domain.file_rules import BadRecordsMax, FileRules, RecordsForm

DATE = "2024-05-01"
ONE = Contribution(trips=1, passengers=45, accidents=0, delay_total_ms=4_080_000)


def record(extra: str = "", **changes: str) -> str:
    """Return one record as JSON; `changes` are fields (underscores for dashes) as JSON, `extra` goes in front."""
    fields = {
        "departure_time": f'"{DATE}T01:23:00"',
        "bus_type": '"BUS-105"',
        "passengers": "45",
        "delay": '"PT4080S"',
        "accident": "false",
    } | changes
    return "{" + extra + ",".join(f'"{name.replace("_", "-")}":{value}' for name, value in fields.items()) + "}"


def array(*records: str) -> str:
    """Return records as a JSON array without white space."""
    return "[" + ",".join(records) + "]"


def ignored(value: str) -> str:
    """Return one record with an unknown field of this value, given as JSON."""
    return record(extra=f'"x":{value},')


def reader(body: bytes, chunk_bytes: int = 65_536) -> Callable[[], bytes]:
    """Return a `read` that gives the body in chunks and then nothing."""
    chunks = iter([body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)])
    return lambda: next(chunks, b"")


def fold(
    body: bytes | str,
    *,
    rules: FileRules = DEFAULT_RULES,
    limits: ParserLimits = DEFAULT_LIMITS,
    force_strict: bool = False,
) -> FileTotals:
    """Fold a body in one chunk."""
    body = body.encode() if isinstance(body, str) else body
    return total_trip_file(reader(body), date=DATE, rules=rules, limits=limits, force_strict=force_strict)


def refusal(
    body: bytes | str, *, rules: FileRules = DEFAULT_RULES, limits: ParserLimits = DEFAULT_LIMITS
) -> InvalidTripFile:
    """Return how a body is refused, after making sure that both paths say the same."""
    with pytest.raises(InvalidTripFile) as by_default:
        fold(body, rules=rules, limits=limits)
    with pytest.raises(InvalidTripFile) as by_reference:
        fold(body, rules=rules, limits=limits, force_strict=True)
    assert str(by_default.value) == str(by_reference.value)
    assert by_default.value.reported == by_reference.value.reported
    return by_default.value


def of_form(written: str, bad_records_max: str = "0") -> FileRules:
    """Return rules with records in this form."""
    return FileRules(form=RecordsForm.parse(written), bad_records_max=BadRecordsMax.parse(bad_records_max))


def test_a_file_is_totalled() -> None:
    """Trips, passengers, accidents and delay are added up over all records."""
    body = array(record(), record(passengers="5", delay='"PT-80S"', accident="true"))
    assert fold(body).contribution == Contribution(trips=2, passengers=50, accidents=1, delay_total_ms=4_000_000)


@pytest.mark.parametrize(
    "body",
    [
        f"[{record()},{record()}]",
        f"\n [ {record()}\t, \r\n{record()} ] \n",
        json.dumps([json.loads(record())] * 2, indent=4),
        json.dumps([json.loads(record())] * 2, separators=(" , ", " : ")),
        array(record(bus_type='"} , ] {"'), record(bus_type='"\\"}\\\\"')),
        array(record(bus_type='"Straße 🚌"'), record()),
        array(record(delay='"PT-1H-8M"'), record(delay='"P1W"')),
        array(record(departure_time='"2024-05-01T01:23"'), record()),
        array(record(departure_time='"2024-05-01T01:23:00+05:30"'), record()),
        array(ignored("[{},[1,{}],null]"), record()),
        array(ignored("[[]," + "[" * 61 + "]" * 62), record()),
        "[]",
        " [ ]\n",
    ],
)
def test_ordinary_files_take_the_batch_path(body: str) -> None:
    """White space, pretty printing, braces in strings, Unicode, unknown fields and every known spelling stay fast."""
    fast, reference = fold(body), fold(body, force_strict=True)
    assert (fast.strict_path_records, reference.strict_path_records) == (0, reference.records)
    assert fast.contribution == reference.contribution


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1000])
@pytest.mark.parametrize("window_bytes", [250, 1000])
def test_the_batch_path_finds_records_among_nested_objects(chunk_bytes: int, window_bytes: int) -> None:
    """A window that ends in a nested object is cut back to a record's end, however many objects are nested."""
    stops = array(*['{"a":{"b":"}"}}'] * 5)
    body = array(*[ignored(stops)] * 20)
    folded = total_trip_file(
        reader(body.encode(), chunk_bytes), date=DATE, limits=ParserLimits(window_bytes=window_bytes)
    )
    assert folded.contribution.trips == 20
    assert folded.strict_path_records == 0


def test_a_record_longer_than_a_window_takes_the_strict_path() -> None:
    """A record that does not fit into a window is totalled, and so are all records after it."""
    body = array(record(), ignored('"' + "y" * 500 + '"'), record())
    folded = fold(body, limits=ParserLimits(window_bytes=300))
    assert (folded.strict_path_records, folded.contribution.trips) == (2, 3)


def test_an_empty_array_contributes_nothing() -> None:
    """A city without a trip is a valid file."""
    assert fold("[]").contribution == Contribution(trips=0, passengers=0, accidents=0, delay_total_ms=0)


@pytest.mark.parametrize("delay", ["P366D", "-P366D"])
def test_a_file_whose_sum_is_beyond_its_bound_is_refused(delay: str) -> None:
    """Each record is valid, and the sum could not be stored: the file fails by its own fault."""
    late = record(delay=f'"{delay}"')
    most = FIGURE_MAX // (366 * 86_400_000)
    assert abs(fold(array(*[late] * most)).contribution.delay_total_ms) <= FIGURE_MAX
    refused = refusal(array(*[late] * (most + 1)))
    assert refused.reason.startswith("delay_total_ms of the file adds up to")
    assert str(FIGURE_MAX) in refused.reason


def test_a_byte_order_mark_is_left_out_once() -> None:
    """One byte order mark before the array is ignored, a second is refused."""
    body = f"[{record()}]".encode()
    assert total_trip_file(reader(b"\xef\xbb\xbf" + body, 1), date=DATE).contribution == ONE
    assert "expected an array" in refusal(b"\xef\xbb\xbf\xef\xbb\xbf" + body).reason


def test_trips_on_other_dates_are_counted() -> None:
    """A night bus that leaves on another date counts as a trip, and is reported."""
    departures = ["2024-05-01T00:00:00", "2024-04-30T23:59:59", "2024-05-02T00:00:00", "2024-05-01T23:59:59"]
    body = array(*(record(departure_time=json.dumps(departure)) for departure in departures))
    for force_strict in (False, True):
        folded = fold(body, force_strict=force_strict)
        assert (folded.contribution.trips, folded.trips_on_other_dates) == (4, 2)


@pytest.mark.parametrize(
    ("departure", "on_other_dates"),
    [
        ("2024-04-30T23:59:59", 1),
        ("2024-05-02T00:00:00", 1),
        ("2024-05-01T23:59:59.9999999", 0),
        ("2024-04-30T23:59:59.9999999", 1),
        ("2024-04-30T23:59:59\\u002e9999999", 1),
        ("2024-04-30T23:59:59.9999999Z", 1),
        ("2024-05-01T00:00:00.0000001", 0),
        ("2024-05-01T23:30:00-05:00", 0),
        ("2024-05-02T00:30:00+05:30", 1),
    ],
)
def test_a_fraction_or_offset_does_not_change_the_date_of_a_departure(departure: str, on_other_dates: int) -> None:
    """The date is the ten characters written, though the quick decoder would round the moment into the next day."""
    folded = fold(array(record(departure_time=f'"{departure}"')))
    assert folded.strict_path_records == 0
    assert folded.trips_on_other_dates == on_other_dates


def test_a_departure_with_text_after_a_nul_is_refused() -> None:
    """The quick decoder stops at an escaped NUL; the rules read on, and refuse what follows."""
    assert refusal(array(record(departure_time='"2024-05-01T01:23:00\\u0000more"'))).field == "departure-time"


def test_of_two_fields_with_one_name_the_last_counts() -> None:
    """A repeated field replaces the one before, whatever that was, and however the name is written."""
    for first in ("7", '"many"', "{}", "[[]]"):
        for name in ("passengers", "p\\u0061ssengers"):
            assert fold(array(record(extra=f'"{name}":{first},'))).contribution == ONE
    for last in ('"many"', "{}", "[46]", '{"passengers":46}'):
        assert refusal(array(record(passengers=f'45,"passengers":{last}'))).field == "passengers"


@pytest.mark.parametrize(
    "value",
    [
        "1e400",
        "-0.0",
        "1e-99999999999999999999",
        "1e99999999999999999999",
        "9" * 640,
        "1." + "3" * 640,
        '"' + "9" * 2000 + '"',
        '"\\ud83d\\ude00"',
        '"\\ud800"',
        '"\\u0000"',
        "[" * 62 + "]" * 62,
        '{"a":' * 62 + "1" + "}" * 62,
        array(*["[{}]"] * 100),
    ],
)
def test_an_unknown_field_may_hold_any_json(value: str) -> None:
    """Numbers beyond any type, long digits in strings, lone surrogates and 64 levels are ignored with their field."""
    for force_strict in (False, True):
        assert fold(array(ignored(value)), force_strict=force_strict).contribution == ONE


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("NaN", "not JSON"),
        ("-Infinity", "not JSON"),
        ("01", "not JSON"),
        ("1.", "not JSON"),
        ("+1", "not JSON"),
        ("'x'", "not JSON"),
        ("[1,]", "not JSON"),
        ("{1:2}", "not JSON"),
        ("/**/1", "not JSON"),
        ("\v1", "vertical tab"),
        ('"\\x41"', "not JSON"),
        ('"\t"', "not JSON"),
        ('"\\udc00"', "not Unicode"),
        ("9" * 641, "more than 640 digits"),
        ("1." + "3" * 641, "more than 640 digits"),
        ("[" * 63 + "]" * 63, "nested deeper than 64"),
        ('{"}":' * 63 + "1" + "}" * 63, "nested deeper than 64"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64"),
        ('["\\"",' + "[" * 62 + "]" * 62 + ',"\\""]', "nested deeper than 64"),
        ('["\\\\",' + "[" * 62 + "]" * 62 + ',"\\\\"]', "nested deeper than 64"),
        ('{"a":' * 100_000, "nested deeper than 64"),
    ],
)
def test_invalid_or_unbounded_json_is_refused_in_unknown_fields_too(value: str, reason: str) -> None:
    """An ignored field still has to be JSON, of bounded depth and of numbers that can be read."""
    verdict = refusal(array(record(), ignored(value), record()))
    assert reason in verdict.reason
    assert (verdict.record_number, verdict.byte_offset) == (2, len(record()) + 2)


@pytest.mark.parametrize("value", [b'"\xff"', b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"\xe2\x82"'])
def test_invalid_utf_8_is_refused_in_unknown_fields_too(value: bytes) -> None:
    """Invalid bytes, overlong forms and encoded surrogates are no text, wherever they stand."""
    body = array(ignored("?")).encode().replace(b"?", value)
    assert refusal(body).record_number == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "empty document"),
        (" \r\n\t ", "empty document"),
        ("\ufeff", "empty document"),
        ("{}", "got an object"),
        (f'{{"trips":[{record()}]}}', "got an object"),
        ("null", "expected an array"),
        ("<html>", "expected an array"),
        ("[", "ends inside"),
        (f"[{record()}", "ends inside"),
        (f"[{record()},", "ends inside"),
        (f"[{record()[:40]}", "ends inside"),
        (f"[{record()},]", "not JSON"),
        (f"[,{record()}]", "not JSON"),
        (f"[{record()},,{record()}]", "not JSON"),
        (f"[{record()} {record()}]", "not JSON"),
        (f"[{record()}}}]", "not JSON"),
        (f"[{record()}]]", "something follows"),
        (f"[{record()}][]", "something follows"),
        (f"[{record()}]x", "something follows|not JSON"),
        (f'[{record()}]"', "something follows"),
        (f'[{record()}] "a]  ', "something follows"),
        (f"[{record()}]\ntru", "something follows"),
        (f"[{record()}] 12", "something follows"),
        (f"[{record()}]\0", "something follows"),
        (f"[{record()}]" + " " * 300_000 + "x", "something follows"),
        (f"[{record()}]\f", "something follows"),
        (f"[{record()}\f]", "expected a comma"),
        ("[1]", "expected an object"),
        ("[null]", "expected an object"),
        ('["trip"]', "expected an object"),
        (f"[[{record()}]]", "got an array"),
        (f"[{record()},[{record()}]]", "got an array"),
        ("[{}]", "missing"),
    ],
)
def test_a_document_that_is_no_array_of_trips_is_refused(body: str, reason: str) -> None:
    """Other top-level values, cut files, stray commas and whatever follows the array are errors with a reason."""
    verdict = refusal(body)
    assert any(part in verdict.reason for part in reason.split("|")), verdict


def test_a_bad_record_is_named_by_number_place_field_and_value() -> None:
    """The error says which record, where it begins, what the field held and what was expected."""
    good = record()
    body = f"\ufeff[{good},\n{good},{record(passengers='true')},{good}]"
    verdict = refusal(body)
    assert verdict.record_number == 3
    assert verdict.byte_offset == body.encode().index(b"{", 2 * len(good) + 5)
    assert (verdict.field, verdict.value) == ("passengers", "True")
    assert str(verdict) == (
        f"record 3, byte {verdict.byte_offset}, field 'passengers', value True: Expected `int`, got `bool`"
    )


def test_bad_records_are_left_out_and_reported_as_far_as_they_are_allowed() -> None:
    """Folding goes on past bad records; at the end their number decides, as a count or as a percentage."""
    good, bad = record(), record(passengers="-1")
    body = array(good, bad, good, record(delay='"P1Y"'))
    for allowed in ("2", "50%"):
        folded = fold(body, rules=FileRules(bad_records_max=BadRecordsMax.parse(allowed)))
        assert (folded.contribution.trips, folded.bad_records, folded.records) == (2, 2, 4)
        assert [(one.record_number, one.byte_offset, one.field) for one in folded.reported] == [
            (2, len(good) + 2, "passengers"),
            (4, 2 * len(good) + len(bad) + 4, "delay"),
        ]
    for allowed in ("1", "49.9%"):
        with pytest.raises(
            TooManyBadRecords, match=r"^2 of 4 records are invalid; the first: record 2, byte \d+, field"
        ):
            fold(body, rules=FileRules(bad_records_max=BadRecordsMax.parse(allowed)))


def test_records_that_are_no_objects_are_bad_records() -> None:
    """Any other JSON value in the place of a trip is left out like a trip that breaks a rule, and found by its byte."""
    values = ["1", "null", '"}, {"', "[[{}]]", "-1.5e3", "true", '""', "[]"]
    body = " [ " + " , ".join([record(), *values, record()]) + " ] "
    for force_strict in (False, True):
        folded = fold(body, rules=FileRules(bad_records_max=BadRecordsMax.parse("80%")), force_strict=force_strict)
        assert (folded.contribution.trips, folded.bad_records, folded.records) == (2, 8, 10)
        places = [bad.byte_offset for bad in folded.reported if bad.byte_offset is not None]
        assert [body[place : place + len(value)] for place, value in zip(places, values, strict=True)] == values
        assert [bad.record_number for bad in folded.reported] == list(range(2, 10))


def test_of_many_bad_records_the_first_hundred_are_reported() -> None:
    """All bad records are counted, and no more are kept than the report holds."""
    body = array(*[record(passengers=str(-number)) for number in range(1, 1001)])
    verdict = refusal(body)
    assert isinstance(verdict, TooManyBadRecords)
    assert (verdict.bad_records, verdict.records, len(verdict.reported)) == (1000, 1000, BAD_RECORDS_REPORTED_MAX)
    assert [bad.value for bad in verdict.reported] == [str(-number) for number in range(1, 101)]
    assert str(verdict).startswith(
        "1,000 of 1,000 records are invalid; the first: record 1, byte 1, field 'passengers'"
    )
    assert str(verdict.reported[1]).startswith(f"record 2, byte {2 + len(record(passengers='-1'))}, field 'passengers'")


@pytest.mark.parametrize("fault", ["{]", '{"x":1', "[" * 100, '{"x":' + "9" * 641 + "}", record() + "]x"])
def test_a_fault_of_the_document_refuses_the_file_whatever_the_limit_of_bad_records(fault: str) -> None:
    """A fault of the document refuses the file, and the bad records before it are told with it."""
    verdict = refusal(
        f"[{record()},{record(delay='5')},{fault}", rules=FileRules(bad_records_max=BadRecordsMax.parse("100%"))
    )
    assert not isinstance(verdict, TooManyBadRecords)
    assert verdict.bad_records == 1
    assert [(bad.record_number, bad.field) for bad in verdict.reported] == [(2, "delay")]


def test_trips_on_other_dates_can_be_bad_records() -> None:
    """If the rules say so, a trip on another date is left out and reported, and has no count of its own."""
    body = array(record(), record(departure_time='"2024-05-02T00:00:00"'), record())
    rules = FileRules(bad_records_max=BadRecordsMax.parse("1"), other_dates_are_bad=True)
    for force_strict in (False, True):
        folded = fold(body, rules=rules, force_strict=force_strict)
        assert (folded.contribution.trips, folded.trips_on_other_dates, folded.bad_records) == (2, 0, 1)
        assert (folded.reported[0].field, folded.reported[0].value) == ("departure-time", "'2024-05-02T00:00:00'")
    assert refusal(body, rules=FileRules(other_dates_are_bad=True)).record_number == 2


@pytest.mark.parametrize(
    "odd",
    [
        record(passengers="-1"),
        record(bus_type='"\\ud800"'),
        record(extra='"passengers":"many",'),
        ignored('"' + "y" * 200_000 + '"'),
        ignored("[" + "{}," * 50_000 + "{}]"),
        "null",
    ],
)
@pytest.mark.parametrize("form", ["array", "lines", "/trips"])
def test_the_batch_path_continues_after_an_odd_record(odd: str, form: str) -> None:
    """In a file with a few odd records, the strict path reads only the records around them."""
    records = ([record()] * 5_000 + [odd]) * 3 + [record()] * 5_000
    body = "\n".join(records) if form == "lines" else array(*records)
    rules = of_form(form, bad_records_max="3")
    folded = fold(body if form != "/trips" else f'{{"trips":{body}}}', rules=rules)
    assert folded.records == 20_003
    assert 3 <= folded.strict_path_records < 500


PRETTY = json.dumps([json.loads(record())] * 2, indent=4)


@pytest.mark.parametrize(
    ("form", "body", "trips"),
    [
        ("lines", f"{record()}\n{record()}\n", 2),
        ("lines", f"{record()}\n{record()}", 2),
        ("lines", f"{record()}\r\n{record()}\r\n", 2),
        ("lines", f"\ufeff{record()}\n", 1),
        ("lines", f"\n\n \t\r\n{record()}\n \n\n{record()} \t\n\n", 2),
        ("lines", f"{ignored('[1, {}]')}\n{record(bus_type=json.dumps(chr(10) + '}{'))}", 2),
        ("lines", "", 0),
        ("lines", "\n \n", 0),
        ("/trips", f'{{"trips":[{record()}]}}', 1),
        ("/trips", f'\ufeff {{ "trips" : {PRETTY} }} \n', 2),
        ("/trips", '{"trips":[]}', 0),
        ("/data/trips", f'{{"a":[{{"trips":[1]}}],"data":{{"b":"[{{","trips":[{record()}],"c":{{}}}},"trips":[2]}}', 1),
        ("/data/trips", f'{{"data":{{"data":{{"trips":[1]}},"\\u0074rips":[{record()},{record()}]}}}}', 2),
        ("/a.b/c~1d/~0", f'{{"a.b":{{"c/d":{{"~":[{record()}]}}}}}}', 1),
        ("/", f'{{"":[{record()}]}}', 1),
        ("/trips", f'{{"x":{json.dumps("y" * 900_000)},"trips":[{record()}],"z":{json.dumps("y" * 900_000)}}}', 1),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 5, 65_536])
def test_records_are_found_in_each_form(form: str, body: str, trips: int, chunk_bytes: int) -> None:
    """Lines may be blank, end in CRLF or not end; a path may have anything around it; both paths find the records."""
    if len(body) > 10_000 and chunk_bytes < 100:
        chunk_bytes = 10_007
    for force_strict in (False, True):
        folded = total_trip_file(
            reader(body.encode(), chunk_bytes), date=DATE, rules=of_form(form), force_strict=force_strict
        )
        assert folded.contribution.trips == trips
        assert folded.strict_path_records == (trips if force_strict else 0)


@pytest.mark.parametrize(
    ("form", "body", "reason"),
    [
        ("lines", f"{record()} {record()}", "something follows a record in its line"),
        ("lines", f"{record()}{record()}\n", "something follows a record in its line"),
        ("lines", f"{record()},\n{record()}", "something follows a record in its line"),
        ("lines", f"{record()}\r{record()}", "something follows a record in its line"),
        ("lines", json.dumps(json.loads(record()), indent=1), "the line ends inside a record"),
        ("lines", f'{record()}\n{{"x":"\n"}}', "the line ends inside a record"),
        ("lines", f"{record()}\n{record()[:-1]}", "the file ends inside a record"),
        ("lines", f"{record()}\n\f{record()}", "vertical tab or form feed"),
        ("lines", f"[\n{record()},\n{record()}\n]", "the line ends inside a record"),
        ("lines", f"[{record()}]", "got an array"),
        ("lines", f"\ufeff\ufeff{record()}", "not JSON"),
        ("/trips", "", "empty document"),
        ("/trips", "\ufeff \n", "empty document"),
        ("/trips", f"[{record()}]", "expected an object, got an array"),
        ("/trips", "null", "expected an object, got null"),
        ("/trips", "{}", "there is no /trips"),
        ("/data/trips", f'{{"trips":[{record()}]}}', "there is no /data"),
        ("/data/trips", '{"data":{}}', "there is no /data/trips"),
        ("/data/trips", '{"data":[]}', "expected an object at /data, got an array"),
        ("/data/trips", '{"data":{"trips":{}}}', "expected an array of trips at /data/trips, got an object"),
        ("/trips", '{"trips":"none"}', "expected an array of trips at /trips, got a string"),
        ("/trips", f'{{"trips":[{record()}],"trips":[]}}', "there is more than one /trips"),
        ("/trips", f'{{"trips":null,"trips":[{record()}]}}', "got null"),
        ("/a/t", f'{{"a":{{"t":[{record()}]}},"a":{{}}}}', "there is more than one /a"),
        ("/trips", f'{{"trips":[{record()}]', "the file ends inside its document"),
        ("/trips", f'{{"trips":[{record()}', "the file ends inside its array"),
        ("/trips", f'{{"x":1,"trips":[{record()}],}}', "not JSON"),
        ("/trips", f'{{"x":01,"trips":[{record()}]}}', "not JSON"),
        ("/trips", f'{{"trips":[{record()}],"x":NaN}}', "not JSON"),
        ("/trips", f'{{"trips":[{record()}],"x":{"9" * 10_000}}}', "640 digits"),
        ("/trips", f'{{"x":{"[" * 100_000},"trips":[{record()}]}}', "nested deeper than 64"),
        ("/trips", f'{{"trips":[{record()}],"x":{"[" * 100_000}}}', "nested deeper than 64"),
        ("/trips", f'{{"trips":[{record()}]}}{{}}', "something follows"),
        ("/trips", f'{{"trips":[{record()}]}} tru', "something follows"),
        ("/trips", f'{{"trips":[{record()}]}} "}}', "something follows"),
        (
            "/trips",
            f'{{"x":{json.dumps("y" * 1_100_000)},"trips":[]}}',
            "does not begin within the first 1048576 bytes",
        ),
        ("/trips", f'{{"trips":[],"x":{json.dumps("y" * 1_100_000)}}}', "more than 1048576 bytes follow"),
    ],
)
def test_a_file_of_another_form_is_refused(form: str, body: str, reason: str) -> None:
    """A broken line or path has a reason of its own, whatever number of bad records is allowed."""
    assert reason in str(refusal(body, rules=of_form(form)))


def in_form(form: str, *records: str) -> str:
    """Return a document of this form without white space."""
    if form == "lines":
        return "\n".join(records)
    return array(*records) if form == "array" else f'{{"trips":{array(*records)}}}'


@pytest.mark.parametrize("form", ["array", "lines", "/trips"])
@pytest.mark.parametrize(
    ("odd", "answer"),
    [
        (record(extra='"x":{"a":[{}]},'), None),
        (record(bus_type='"}],{["'), None),
        (record(bus_type='"\\"\\\\\\/\\u0022"'), None),
        (record(bus_type='"\\ud83d\\ude8c 🚌"'), None),
        (record(bus_type='"\\ud83d"'), None),
        (record(extra='"passengers":"many",'), None),
        (ignored('"' + "y" * 300_000 + '"'), None),
        (record(passengers="NaN"), "not JSON"),
        (ignored("NaN"), "not JSON"),
        (ignored("[" * 100_000 + "]" * 100_000), "nested deeper than 64"),
        (record(passengers="9" * 10_000), "a number has more than 640 digits in a row"),
        (ignored("9" * 10_000), "a number has more than 640 digits in a row"),
        (record(passengers="9" * 600), "field 'passengers'"),
        (record(bus_type="105"), "field 'bus-type', value 105: Expected `str`, got `int`"),
        (record(delay="4080"), "field 'delay', value 4080: Expected `str`, got `int`"),
        (record(delay='"PT-90S"'), None),
        (record(delay='"-PT1M30S"'), None),
        (record(delay='"P1Y"'), "field 'delay', value 'P1Y'"),
        (record(delay='"P1M"'), "field 'delay', value 'P1M'"),
        (ignored('"' + "y" * 1_100_000 + '"'), "a record is longer than 1048576 bytes"),
    ],
)
def test_an_odd_record_has_one_outcome_in_every_form(form: str, odd: str, answer: str | None) -> None:
    """The rules of a record are the same for every form of file and for both paths."""
    body = in_form(form, record(), odd, record())
    if answer:
        verdict = refusal(body, rules=of_form(form))
        assert answer in str(verdict)
        assert (verdict.record_number, verdict.byte_offset) == (2, body.index(odd))
    else:
        for force_strict in (False, True):
            assert fold(body, rules=of_form(form), force_strict=force_strict).contribution.trips == 3


def test_a_long_value_is_shortened_in_the_error() -> None:
    """However long a bad value is, the error quotes at most 100 characters of it."""
    verdict = refusal(array(record(delay=json.dumps("x" * 10_000))))
    assert verdict.value is not None
    assert len(verdict.value) <= 100
    assert len(str(verdict)) < 300


@pytest.mark.parametrize("delay", ["P4T080S", "4PT080S", "PT40S80", "P4080TS", "PT40S,PT80", "PT", "S"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_malformed_delay_is_refused_among_plain_ones(delay: str, place: int) -> None:
    """Delays of whole seconds are added up together, and each still has to be one by itself."""
    records = [record(delay='"PT1S"'), record(delay='"PT20S"')]
    records.insert(place, record(delay=json.dumps(delay)))
    assert f"field 'delay', value {delay!r}" in str(refusal(array(*records)))


def test_one_bad_record_far_inside_is_found_after_the_batch_path() -> None:
    """Totals, numbers and offsets are carried over when the strict path goes on from a declined window."""
    good = record()
    before = 3000
    body = array(*[good] * before, record(delay='"P1Y"'), *[good] * 10)
    verdict = refusal(body, limits=ParserLimits(window_bytes=4096))
    assert (verdict.record_number, verdict.byte_offset) == (before + 1, 1 + before * (len(good) + 1))


@pytest.mark.parametrize("force_strict", [False, True])
def test_a_record_may_be_as_long_as_the_limit(force_strict: bool) -> None:
    """A record of exactly `record_bytes` counts, and one byte more is refused, between short ones and alone."""
    limits = ParserLimits(record_bytes=5000, window_bytes=1000)
    fits = ignored('"' + "y" * (5000 - len(ignored('""'))) + '"')
    too_long = fits.replace("y", "yy", 1)
    body = array(record(), fits, record())
    assert fold(body, limits=limits, force_strict=force_strict).contribution.trips == 3
    for body in (array(record(), too_long, record()), array(too_long)):
        with pytest.raises(InvalidTripFile, match="longer than 5000 bytes"):
            fold(body, limits=limits, force_strict=force_strict)


def endless(opening: bytes, repeated: bytes) -> Callable[[], bytes]:
    """Return a `read` that begins one way and goes on for ever, failing the test after 8 MiB."""

    def chunks() -> Iterator[bytes]:
        yield opening
        for _ in range(128):
            yield repeated * (65_536 // len(repeated))
        pytest.fail("8 MiB of an endless token were read")

    stream = chunks()
    return lambda: next(stream)


@pytest.mark.parametrize("force_strict", [False, True])
@pytest.mark.parametrize(
    ("opening", "repeated"),
    [
        (b'["', b"x"),
        (b'["', b"}"),
        (b'[{"x":"', b"}"),
        (b'[{"x":"', b'\\"'),
        (b"[{", b'"x":1,'),
        (b'[{"x":[', b"1,"),
        (b"[", b"1"),
        (b'["', b"1"),
        (f'[{record()},"'.encode(), b"}"),
        (f'[{record()}]"'.encode(), b"}"),
        (f"[{record()}]".encode(), b"]"),
    ],
)
def test_an_endless_token_is_refused_in_bounded_memory(opening: bytes, repeated: bytes, force_strict: bool) -> None:
    """A token without an end is refused at the limit of a record, in bounded memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidTripFile):
            total_trip_file(
                endless(opening, repeated),
                date=DATE,
                limits=ParserLimits(record_bytes=128 * 1024),
                force_strict=force_strict,
            )
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 1024 * 1024


@pytest.mark.parametrize("force_strict", [False, True])
@pytest.mark.parametrize(
    ("form", "opening", "repeated"),
    [
        ("lines", b'{"x":"', b"}"),
        ("lines", b"{", b'"x":1,'),
        ("lines", b" ", b"["),
        ("lines", f"{record()}\n".encode(), b"1"),
        ("/trips", b'{"x":"', b"["),
        ("/trips", b"{", b'"' + b"x" * 200 + b'":1,'),
        ("/trips", b'{"trips":[{"x":"', b"}"),
        ("/trips", b'{"trips":[],"x":"', b"}"),
        ("/trips", b'{"trips":[]}', b" "),
    ],
)
def test_an_endless_token_is_refused_in_every_form(
    form: str, opening: bytes, repeated: bytes, force_strict: bool
) -> None:
    """Lines, and what stands around an array under a path, are bounded like records."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidTripFile):
            total_trip_file(
                endless(opening, repeated),
                date=DATE,
                rules=of_form(form),
                limits=ParserLimits(record_bytes=128 * 1024),
                force_strict=force_strict,
            )
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 1024 * 1024


def test_white_space_without_end_takes_no_memory() -> None:
    """Megabytes of white space before, between and after the records are read past."""
    space = b" " * 65_536

    def chunks() -> Iterator[bytes]:
        for token in (b"[", record().encode(), b",", record().encode(), b"]", b""):
            yield from [space] * 64
            yield token

    stream = chunks()
    tracemalloc.start()
    try:
        folded = total_trip_file(lambda: next(stream), date=DATE)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert folded.contribution.trips == 2
    assert peak_bytes < 8 * 1024 * 1024


@pytest.mark.parametrize("force_strict", [False, True])
def test_memory_does_not_grow_with_the_file(force_strict: bool) -> None:
    """A file of many windows is held a few windows at a time."""
    block = (",".join([record()] * 500) + ",").encode()
    blocks = 20 if force_strict else 200

    def chunks() -> Iterator[bytes]:
        yield b"["
        yield from [block] * blocks
        yield record().encode() + b"]"
        yield b""

    stream = chunks()
    tracemalloc.start()
    try:
        folded = total_trip_file(lambda: next(stream), date=DATE, force_strict=force_strict)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert folded.contribution.trips == blocks * 500 + 1
    assert peak_bytes < 4 * 1024 * 1024


@pytest.mark.parametrize("force_strict", [False, True])
@pytest.mark.parametrize("error", [ConnectionResetError("cut"), UnicodeDecodeError("utf-8", b"x", 0, 1, "mine")])
def test_an_error_of_the_download_is_raised_unchanged(error: Exception, force_strict: bool) -> None:
    """A broken download is no verdict on the file, even if its error is of a kind that parsing raises too."""

    def chunks() -> Iterator[bytes]:
        yield f"[{record()},{record()[:30]}".encode()
        raise error

    stream = chunks()
    with pytest.raises(type(error)) as passed_on:
        total_trip_file(lambda: next(stream), date=DATE, force_strict=force_strict)
    assert passed_on.value is error


@pytest.mark.parametrize("force_strict", [False, True])
def test_a_valid_file_is_read_to_its_end(force_strict: bool) -> None:
    """All of a valid file is read, to the empty chunk, so whoever hashes what is read hashes the file."""
    chunks = [f"[{record()}]".encode(), b"\n", b"  ", b""]
    total_trip_file(lambda: chunks.pop(0), date=DATE, force_strict=force_strict)
    assert chunks == []


@pytest.mark.parametrize("force_strict", [False, True])
def test_progress_has_the_number_of_trips_so_far(force_strict: bool) -> None:
    """The reported numbers never fall, and the last is the number of trips."""
    body = array(*[record()] * 2000)
    told: list[int] = []
    total_trip_file(
        reader(body.encode(), 4096),
        date=DATE,
        limits=ParserLimits(window_bytes=4096),
        progress=told.append,
        force_strict=force_strict,
    )
    assert told == sorted(told)
    assert len(told) > 10
    assert told[-1] == 2000


def test_a_window_larger_than_the_record_limit_is_refused() -> None:
    """A window never holds a record that the strict path would find too long."""
    bad: list[dict[str, Any]] = [{"window_bytes": 2_000_000}, {"window_bytes": 0}, {"depth": 1}]
    for bounds in bad:
        with pytest.raises(ValueError, match=r"holds at least|two deep"):
            ParserLimits(**bounds)


def test_huge_integers_do_not_crash_the_process() -> None:
    """Integers that Python refuses to convert never reach the C parser, under the strictest setting as well."""
    program = (
        "from services.ingest.parsing.parser import *\n"
        "for digits in (640, 641, 4300, 4301, 100_000):\n"
        "    for force_strict in (False, True):\n"
        "        body = iter([b'[{\"x\":[' + b'9' * digits + b',1,2,3,{}]}]', b''])\n"
        "        try:\n"
        "            total_trip_file(lambda: next(body), date='2024-05-01', force_strict=force_strict)\n"
        "        except InvalidTripFile as error:\n"
        "            print(digits, error.reason)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-X", "int_max_str_digits=640", "-c", program], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    told = ran.stdout.splitlines()
    assert told[:2] == ["640 the field is missing"] * 2
    assert [line.partition(" ")[2] for line in told[2:]] == ["a number has more than 640 digits in a row"] * 8
