"""The judgement of volumes: by examples, and on a year of the reference upstream."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.volume import DAYS_NEEDED, WEEKS_COMPARED, Volume, VolumeRules, dates_compared, suspicion_of
from tripfold.local.trip_files import TripFile, UpstreamOptions, city_list, trip_file

WEDNESDAY = dt.date(2024, 5, 1)
USUAL = [Volume(10_000, 1_000_000)] * WEEKS_COMPARED
RULES = VolumeRules()
FALSE_ALARMS_MAX = 0.01


@pytest.mark.parametrize(
    ("file", "suspicion"),
    [
        (Volume(10_000, 1_000_000), None),
        (Volume(6_500, 650_000), None),
        (Volume(6_499, 1_000_000), "6,499 trips; usual on a Wednesday are 10,000"),
        (Volume(10_000, 649_999), "649,999 bytes; usual on a Wednesday are 1,000,000"),
        (Volume(30_000, 3_000_000), None),
        (Volume(30_001, 3_000_000), "30,001 trips; usual on a Wednesday are 10,000"),
        (Volume(30_000, 3_000_001), "3,000,001 bytes; usual on a Wednesday are 1,000,000"),
        (Volume(0, 2), "0 trips; usual on a Wednesday are 10,000"),
    ],
)
def test_a_volume_far_from_the_usual_is_suspicious(file: Volume, suspicion: str | None) -> None:
    """Trips and bytes may be 0.65 to 3 times the usual ones."""
    assert suspicion_of(WEDNESDAY, file, USUAL, RULES) == suspicion


def test_a_small_city_is_exempt_but_not_its_sudden_growth() -> None:
    """Below 1,000 trips both then and now there is no judgement."""
    small = [Volume(999, 100_000)] * WEEKS_COMPARED
    assert suspicion_of(WEDNESDAY, Volume(0, 2), small, RULES) is None
    assert suspicion_of(WEDNESDAY, Volume(3_000, 300_001), small, RULES) is not None


def test_a_few_earlier_days_decide_and_too_few_do_not() -> None:
    """Three earlier days suffice; outliers among eight do not change the median."""
    assert suspicion_of(WEDNESDAY, Volume(0, 2), USUAL[: DAYS_NEEDED - 1], RULES) is None
    assert suspicion_of(WEDNESDAY, Volume(0, 2), USUAL[:DAYS_NEEDED], RULES) is not None
    assert suspicion_of(WEDNESDAY, USUAL[0], [Volume(0, 2)] * 3 + USUAL[:5], RULES) is None


@given(st.dates(min_value=dt.date(2000, 1, 1)))
def test_only_the_same_weekday_of_the_last_eight_weeks_is_compared(date: dt.date) -> None:
    """Each compared date is a whole number of weeks earlier, from one to eight."""
    assert [(date - one).days for one in dates_compared(date)] == list(range(7, 57, 7))


def test_halved_and_empty_files_of_a_year_are_suspicious_and_whole_ones_are_not() -> None:
    """On each date of a year, every tenth city of the reference upstream: whole, halved, and empty."""
    options = UpstreamOptions()
    first = dt.date(2024, 1, 1)
    days = range(-7 * WEEKS_COMPARED, 366)
    alarms, judged = 0, 0
    for city in city_list(options)[::10]:
        files = {day: trip_file(options, city.id, first + dt.timedelta(days=day)) for day in days}
        volumes = {day: volume_of(file) for day, file in files.items()}
        for day in range(366):
            date = first + dt.timedelta(days=day)
            earlier = [volumes[(one - first).days] for one in dates_compared(date)]
            halved = volume_of(msgspec.structs.replace(files[day], trips=files[day].trips // 2))
            assert suspicion_of(date, halved, earlier, RULES), (city, date)
            assert suspicion_of(date, Volume(0, 2), earlier, RULES), (city, date)
            alarms += suspicion_of(date, volumes[day], earlier, RULES) is not None
            judged += 1
    assert alarms < FALSE_ALARMS_MAX * judged, f"{alarms} of {judged} whole files are suspicious"


def volume_of(file: TripFile) -> Volume:
    """Return the volume of a file of the reference upstream."""
    return Volume(file.trips, file.size_bytes)
