"""Rules of trip files: parsed from a setting, written back, and applied."""

from __future__ import annotations

import pytest

from shared.domain.file_rules import BadRecordsMax, RecordsForm


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("array", ()),
        ("/trips", ("trips",)),
        ("/data/trips", ("data", "trips")),
        ("/data.trips/2024", ("data.trips", "2024")),
        ("/a~1b/~0~01", ("a/b", "~~1")),
        ("/", ("",)),
        ("//x", ("", "x")),
    ],
)
def test_a_path_is_a_json_pointer(written: str, path: tuple[str, ...]) -> None:
    """Any key can be named, one with dots as it is, one with slashes or tildes by escapes, and is written back."""
    form = RecordsForm.parse(written)
    assert (form.path, form.is_lines) == (path, False)
    assert str(form) == written


def test_the_word_lines_means_one_record_per_line() -> None:
    """The word `lines` means a file with one record on each line."""
    assert RecordsForm.parse("lines").is_lines
    assert str(RecordsForm.parse("lines")) == "lines"


@pytest.mark.parametrize(
    ("written", "most_of_1000"), [("0", 0), ("17", 17), ("0.5%", 5), ("0.05%", 0), ("0.1%", 1), ("100%", 1000)]
)
def test_a_limit_of_bad_records_is_exact(written: str, most_of_1000: int) -> None:
    """A file may have exactly the limit of bad records, and not one more."""
    limit = BadRecordsMax.parse(written)
    assert str(limit) == written
    assert limit.allows(most_of_1000, records=1000)
    assert most_of_1000 == 1000 or not limit.allows(most_of_1000 + 1, records=1000)


@pytest.mark.parametrize("written", ["", "-1", "1.5", "101%", "100.1%", "%", "5 %", "1e3", "٣", "0,5%"])
def test_other_limits_are_refused(written: str) -> None:
    """A limit that is neither a whole number nor a percentage up to 100 is refused with an example of both."""
    with pytest.raises(ValueError, match=r"such as 100, or a percentage of them such as 0\.5%"):
        BadRecordsMax.parse(written)
