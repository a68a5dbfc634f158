"""The law of the two paths: on any bytes, cut in any way, they give the same sums or both refuse the file.

Documents are built from mostly valid records, with fields, spellings and white space that the two decoders are known to
read differently. Then some are damaged. The strict path on the whole document in one piece is the reference. Accepted
documents are also checked against `json.loads` and independent sums.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.aggregate.audit.recount import AuditParser
from services.ingest.parsing.parser import DEFAULT_RULES, BadRecord, InvalidTripFile, ParserLimits, total_trip_file
from services.ingest.parsing.trips import InvalidTrip, delay_ms, departure_date
from shared.domain.file_rules import BadRecordsMax, FileRules, RecordsForm

DATE = "2024-05-01"

Numbers = tuple[int, int, int, int, int]
Outcome = tuple[Numbers | str, int, tuple[BadRecord, ...]]

space = st.sampled_from(["", "", "", " ", "\n", "\t", "\r\n  "])
string_contents = st.sampled_from(
    [
        "BUS-105",
        "}",
        "},{",
        "]",
        '\\"}',
        "\\\\",
        '\\\\\\"{',
        "\\u007d",
        "\\u0000",
        "\\/",
        "é🚌",
        "\\ud83d\\ude00",
        "\\ud800",
        "\\udc00",
        "departure-time",
        '{\\"departure-time\\":\\"',
        "9" * 700,
    ]
) | st.text(st.characters(codec="utf-8", exclude_characters='"\\', exclude_categories=["Cc"]), max_size=8)
unknown_names = string_contents.map('"x{}"'.format)
strings = string_contents.map('"{}"'.format)
numbers = st.sampled_from(
    ["0", "-0", "45", "1.5", "1e400", "-1E+2", "1e-99999999999999999999", "9" * 640, "9" * 641, "0." + "3" * 641]
)
deep = st.builds(
    lambda depth, brackets: brackets[0] * depth + "1" + brackets[1] * depth,
    st.sampled_from([2, 61, 62, 63, 64, 2000]),
    st.sampled_from([("[", "]"), ('{"a":', "}"), ('{"}":', "}")]),
)
any_values = st.recursive(
    strings | numbers | st.sampled_from(["true", "false", "null"]) | deep,
    lambda values: (
        st.lists(values, max_size=3).map(lambda items: "[" + ",".join(items) + "]")
        | st.lists(st.tuples(strings, space, values), max_size=3).map(
            lambda fields: "{" + ",".join(f"{name}{gap}:{value}" for name, gap, value in fields) + "}"
        )
    ),
    max_leaves=5,
)

departures = st.sampled_from(
    [
        "2024-05-01T01:23:00",
        "2024-05-01T00:00:00",
        "2024-05-02T00:00:00",
        "2024-04-30T23:59:59.9999999",
        "2024-05-01T23:59:59.9999999",
        "2024-05-01T23:59:59\\u002e9999999Z",
        "2024-05-01T00:00:00.4",
        "2024-05-01 01:23:00",
        "2024-05-01T01:23",
        "2024-05-01T23:30:00-05:30",
        "2024-05-01T01:23:00z",
        "2024-05-01T01:23:0\\u0030",
    ]
)
odd_departures = st.sampled_from(
    [
        "2024-05-01T01:23:00\\u0000more",
        "2024-05-01T24:00:00",
        "2024-02-30T01:23:00",
        "9999-12-31T23:59:59.9999999",
        "2024-05-01T01:23:00+24:00",
        "2024-05-01",
    ]
)
delays = st.sampled_from(
    ["PT4080S", "PT0S", "PT-4080S", "-PT5M", "PT-1H-8M", "P1W", "PT0.0015S", "PT1M0,0025S", "P366D"]
)
odd_delays = st.sampled_from(["P", "PT", "", "pt1s", "P1Y", "P367D", "P1DT", "PT1.5H3M", "PT5S\\u0000"])
odd_passengers = st.sampled_from(["1000001", "-1", "45.0", "1e2", "true", "null", '"45"', "{}", "[]", "9" * 700])


@st.composite
def records(draw: st.DrawFn, *, odd: bool) -> str:
    """Draw one record as JSON; only with `odd` may it break a rule."""

    def mostly(usual: st.SearchStrategy[str], unusual: st.SearchStrategy[str]) -> str:
        return draw(unusual if odd and draw(st.integers(0, 9)) == 0 else usual)

    fields = [
        ("departure-time", f'"{mostly(departures, odd_departures)}"'),
        ("bus-type", mostly(strings, any_values)),
        ("passengers", mostly(st.integers(0, 1_000_000).map(str), odd_passengers)),
        ("delay", f'"{mostly(delays, odd_delays)}"'),
        ("accident", mostly(st.sampled_from(["true", "false"]), any_values)),
    ]
    pairs = [(f'"{name}"', value) for name, value in fields]
    kind = draw(st.integers(0, 9))
    if kind == 0:
        pairs = draw(st.permutations(pairs))
    elif kind == 1:
        pairs.insert(draw(st.integers(0, 5)), (draw(strings if odd else unknown_names), draw(any_values)))
    elif kind == 2:
        pairs.insert(0, ('"p\\u0061ssengers"', draw(any_values)))
    elif kind == 3 and odd:
        del pairs[draw(st.integers(0, 4))]
    gap = draw(space)
    return "{" + gap + f",{gap}".join(f"{name}{gap}:{value}" for name, value in pairs) + gap + "}"


forms = st.sampled_from(["array", "lines", "/data/trips", "/a.b/~1"]).map(RecordsForm.parse)


@st.composite
def documents(draw: st.DrawFn, form: RecordsForm, *, odd: bool) -> bytes:
    """Draw a document of a few records; only with `odd` may it be damaged."""
    gap = draw(space)
    items = draw(st.lists(records(odd=odd) | any_values if odd else records(odd=odd), max_size=6))
    if form.is_lines:
        text = "".join(item + draw(st.sampled_from(["\n", "\n", "\r\n", "\n \n", " \n\t"])) for item in items)
        text = draw(st.sampled_from([text, text.strip()]))
    else:
        text = gap + "[" + f"{gap},{gap}".join(items) + gap + "]" + draw(space)
        for key in reversed(form.path):
            members = draw(st.lists(st.tuples(strings, any_values), max_size=2)) if odd else []
            members.insert(draw(st.integers(0, len(members))), (json.dumps(key), text))
            text = "{" + gap + ",".join(f"{name}{gap}:{value}" for name, value in members) + gap + "}"
    body = (draw(st.sampled_from(["", "", "\ufeff"])) + text).encode()
    return draw(damaged(body)) if odd and draw(st.booleans()) else body


@st.composite
def damaged(draw: st.DrawFn, body: bytes) -> bytes:
    """Draw a body that is cut, or has an extra or a changed byte or token."""
    place = draw(st.integers(0, len(body)))
    match draw(st.sampled_from(["cut", "flip", "insert", "append"])):
        case "cut":
            return body[:place]
        case "flip":
            return body[:place] + bytes([draw(st.integers(0, 255))]) + body[place + 1 :]
        case "insert":
            tokens = [b",", b"}", b"]", b"{", b"[", b'"', b"\\", b"\f", b"\0", b"\n", b"null", b"/**/"]
            return body[:place] + draw(st.sampled_from(tokens)) + body[place:]
        case _:
            return body + draw(
                st.sampled_from([b"]", b'"a]', b'"}', b"tru", b"1", b"[]", b",", b"\0", b"\xef\xbb\xbf"])
            )


rules = st.builds(
    FileRules,
    form=forms,
    bad_records_max=st.sampled_from(["0", "1", "50%", "100%"]).map(BadRecordsMax.parse),
    other_dates_are_bad=st.booleans(),
)

limits = st.builds(
    ParserLimits,
    window_bytes=st.sampled_from([20, 128, 150, 200, 300, 500, 1000, 10_000]),
    retreats=st.integers(0, 4),
)


def reader(body: bytes, chunk_bytes: int) -> Callable[[], bytes]:
    """Return a `read` that returns the body in chunks and then nothing."""
    chunks = iter([body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)])
    return lambda: next(chunks, b"")


def outcome(
    body: bytes, chunk_bytes: int, limits: ParserLimits, *, rules: FileRules = DEFAULT_RULES, force_strict: bool
) -> Outcome:
    """Parse a body in chunks to its five totals or the text of its refusal, and to its bad records."""
    return outcome_of(reader(body, chunk_bytes), limits, rules=rules, force_strict=force_strict)


def outcome_of(read: Callable[[], bytes], limits: ParserLimits, *, rules: FileRules, force_strict: bool) -> Outcome:
    """Parse the chunks of `read`, as `outcome` does."""
    try:
        folded = total_trip_file(read, date=DATE, rules=rules, limits=limits, force_strict=force_strict)
    except InvalidTripFile as error:
        return str(error), error.bad_records, error.reported
    sums = folded.contribution
    numbers = sums.trips, sums.passengers, sums.accidents, sums.delay_total_ms, folded.trips_on_other_dates
    return numbers, folded.bad_records, folded.reported


def read_otherwise(body: bytes, form: RecordsForm) -> list[Any]:
    """Return the records of a valid document, by `json.loads`."""
    text = body.decode("utf-8-sig")
    if form.is_lines:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    document = json.loads(text)
    for key in form.path:
        document = document[key]
    assert isinstance(document, list)
    return document


def worked_out_otherwise(trips: list[dict[str, Any]]) -> Numbers:
    """Return the five numbers by exact fractions of seconds."""
    units_s = {"W": 604_800, "D": 86_400, "H": 3_600, "M": 60, "S": 1}

    def milliseconds(written: str) -> int:
        parts = re.findall(r"([-+]?[0-9.,]+)([WDHMS])", written)
        seconds = sum(Fraction(number.replace(",", ".")) * units_s[unit] for number, unit in parts)
        return round((-seconds if written.startswith("-") else seconds) * 1000)

    return (
        len(trips),
        sum(trip["passengers"] for trip in trips),
        sum(trip["accident"] for trip in trips),
        sum(milliseconds(trip["delay"]) for trip in trips),
        sum(trip["departure-time"][:10] != DATE for trip in trips),
    )


def check_otherwise(body: bytes, rules: FileRules, found: Outcome) -> None:
    """Check the sums of an accepted document, also by the recount, and the places of its bad records."""
    numbers, bad_records, reported = found
    records = read_otherwise(body, rules.form)
    assert len(reported) == bad_records
    for bad in reported:
        assert bad.byte_offset is not None
        value, _ = json.JSONDecoder().raw_decode(body[bad.byte_offset :].decode())
        assert value == records[bad.record_number - 1]
    bad_numbers = {bad.record_number for bad in reported}
    good = [record for number, record in enumerate(records, start=1) if number not in bad_numbers]
    assert numbers == worked_out_otherwise(good)
    counter = AuditParser(DATE, form=rules.form, other_dates_are_bad=rules.other_dates_are_bad)
    for start in range(0, len(body), 100):
        counter.feed(body[start : start + 100])
    counted = counter.end()
    assert numbers == (
        counted.trips,
        counted.passengers,
        counted.accidents,
        counted.delay_total_ms,
        counted.trips_on_other_dates,
    )
    assert bad_records == counted.bad_records


ways = st.lists(st.tuples(st.sampled_from([1, 3, 64, 500, 100_000]), limits, st.booleans()), min_size=3, max_size=3)


@settings(max_examples=400, deadline=None)
@given(st.data(), rules, ways)
def test_both_paths_agree_on_any_document(
    data: st.DataObject, rules: FileRules, ways: list[tuple[int, ParserLimits, bool]]
) -> None:
    """Sums, bad records and refusals depend only on bytes and rules, not on path, chunks or windows."""
    body = data.draw(documents(rules.form, odd=True))
    expected = outcome(body, len(body) + 1, ParserLimits(), rules=rules, force_strict=True)
    for chunk_bytes, bounds, force_strict in ways:
        assert outcome(body, chunk_bytes, bounds, rules=rules, force_strict=force_strict) == expected
    if not isinstance(expected[0], str):
        check_otherwise(body, rules, expected)


@settings(max_examples=40, deadline=None)
@given(st.data(), rules, st.sampled_from([20, 150, 1000]))
def test_a_cut_between_two_chunks_never_changes_the_outcome(
    data: st.DataObject, rules: FileRules, window_bytes: int
) -> None:
    """A document in two chunks, cut at any byte, has the same outcome as in one, on both paths."""
    body = data.draw(documents(rules.form, odd=True).filter(lambda body: len(body) < 1000))
    bounds = ParserLimits(window_bytes=window_bytes)
    expected = outcome(body, len(body) + 1, bounds, rules=rules, force_strict=True)
    for cut in range(1, len(body)):
        for force_strict in (False, True):
            chunks = iter([body[:cut], body[cut:], b""])
            found = outcome_of(chunks.__next__, bounds, rules=rules, force_strict=force_strict)
            assert found == expected


@settings(max_examples=100, deadline=None)
@given(st.data(), forms, st.sampled_from([1, 50, 100_000]), limits)
def test_valid_documents_add_up(data: st.DataObject, form: RecordsForm, chunk_bytes: int, bounds: ParserLimits) -> None:
    """A document is refused only for the content of its ignored fields; any other adds up exactly."""
    body = data.draw(documents(form, odd=False))
    result = outcome(body, chunk_bytes, bounds, rules=FileRules(form=form), force_strict=False)
    if isinstance(result[0], str):
        allowed = ["nested deeper", "640 digits", "not Unicode"] + ["the line ends inside"] * form.is_lines
        assert any(part in result[0] for part in allowed)
    else:
        check_otherwise(body, FileRules(form=form), result)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda tail: b"[{" + tail), st.sampled_from([1, 5, 100]))
@example(b"", 1)
@example(b"[" * 5000, 100)
@example(b'{"a":' * 5000, 100)
@example(b"\xff\xfe[\x00]\x00", 1)
@example(b'{"t":[]}"}', 1)
@example(b'{"t":[]}tru', 1)
@example(b':"t":[', 1)
@example(b'{"\\ud800":[]}', 1)
def test_arbitrary_bytes_are_parsed_or_refused(body: bytes, chunk_bytes: int) -> None:
    """Arbitrary bytes are parsed or refused, by both paths alike, whatever form is expected."""
    for form in ("array", "lines", "/t", "/?"):
        rules = FileRules(form=RecordsForm.parse(form))
        expected = outcome(body, len(body) + 1, ParserLimits(), rules=rules, force_strict=True)
        for force_strict in (False, True):
            bounds = ParserLimits(window_bytes=16)
            assert outcome(body, chunk_bytes, bounds, rules=rules, force_strict=force_strict) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from("PTWDHMSYptdhms0123456789+-., "), max_size=14)
    | st.from_regex(
        r"[+-]?P([+-]?\d{1,3}W)?([+-]?\d{1,3}D)?(T([+-]?\d{1,4}H)?([+-]?\d{1,5}M)?([+-]?\d+([.,]\d+)?S)?)?",
        fullmatch=True,
    )
)
def test_a_delay_is_exact_or_refused(written: str) -> None:
    """Any duration these rules accept is the exact sum of its parts, rounded once."""
    try:
        result = delay_ms(written)
    except InvalidTrip:
        return
    sign = -1 if written.startswith("-") else 1
    units_s = {"W": 604_800, "D": 86_400, "H": 3_600, "M": 60, "S": 1}
    parts = re.findall(r"([-+]?[0-9]+(?:[.,][0-9]+)?)([WDHMS])", written.lstrip("+-"))
    assert parts
    assert result == round(
        1000 * sign * sum(Fraction(number.replace(",", ".")) * units_s[unit] for number, unit in parts)
    )


@given(
    st.datetimes(timezones=st.none() | st.just(dt.UTC)),
    st.sampled_from(["T", " "]),
    st.sampled_from(["auto", "minutes"]),
)
def test_any_date_and_time_departs_on_its_date(moment: dt.datetime, between: str, precision: str) -> None:
    """Every moment that Python writes as ISO 8601 is a departure on the date it begins with."""
    written = moment.isoformat(sep=between, timespec=precision)
    assert departure_date(written) == moment.date().isoformat()
