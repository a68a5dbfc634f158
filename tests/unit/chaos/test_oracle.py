"""The program that judges a chaos can fail: each kind of wrong that it looks for is named when it is there."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import pytest

from tests.chaos import oracle
from tests.chaos.oracle import Judge, milliseconds, sums_of

DATE = "2024-05-01"
NEXT_DATE = "2024-05-02"
RAW = json.dumps(
    [
        {"passengers": 3, "accident": True, "delay": "PT1M30S"},
        {"passengers": 4, "accident": False, "delay": "-PT5S"},
    ]
).encode()
DIGEST = hashlib.sha256(RAW).hexdigest()


class Object:
    """An object as boto3 gives it."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def get(self) -> dict[str, Any]:
        return {"Body": io.BytesIO(self._body)}


class Bucket:
    """A bucket of one manifest, changed by the test, and the raw object that it names."""

    def __init__(self, **changes: Any) -> None:
        contribution = {"trips": 2, "passengers": 7, "accidents": 1, "delay_total_ms": 85_000}
        self.manifest = {
            "city_id": "7",
            "date": DATE,
            "country_name": "Peru",
            "raw_key": "raw",
            "sha256": DIGEST,
            "size_bytes": len(RAW),
            "contribution": contribution,
            **changes,
        }
        self.objects = self

    def filter(self, *, Prefix: str) -> list[Object]:  # noqa: N803  # as boto3 spells it
        assert Prefix == "manifests/"
        return [Object(json.dumps(self.manifest).encode())]

    def Object(self, key: str) -> Object:  # noqa: N802  # as boto3 spells it
        assert key == "raw"
        return Object(RAW)


def test_a_bucket_that_is_right_has_no_differences() -> None:
    """The sums of a file come out as they can be worked out by hand."""
    judge = Judge(Bucket(), None)
    days, dates = judge.stored({f"7/{DATE}": [DIGEST]})
    assert judge.differences == []
    assert (days, dates) == ({("Peru", DATE): [2, 7, 1, 85_000]}, {DATE})
    assert sums_of(RAW) == [2, 7, 1, 85_000]
    assert milliseconds("P1DT1H") == 90_000_000


@pytest.mark.parametrize(
    ("changes", "versions", "told"),
    [
        ({"contribution": {"trips": 4, "passengers": 14, "accidents": 2, "delay_total_ms": 1}}, [DIGEST], "sums"),
        ({"sha256": "0" * 64}, [DIGEST], "SHA-256"),
        ({"size_bytes": 1}, [DIGEST], "size"),
        ({}, ["0" * 64], "a version that the upstream had"),
    ],
)
def test_a_wrong_manifest_is_named(changes: dict[str, Any], versions: list[str], told: str) -> None:
    """Sums, digest, size and origin are each compared, and the city-day is named."""
    judge = Judge(Bucket(**changes), None)
    judge.stored({f"7/{DATE}": versions})
    assert len(judge.differences) == 1
    assert f"7/{DATE}" in judge.differences[0]
    assert told in judge.differences[0]


@pytest.mark.parametrize(
    ("day", "differences"),
    [({"bus_count": 0, "passenger_count": 0}, 0), ({"bus_count": 1, "passenger_count": 0}, 1)],
    ids=["zeros", "a trip"],
)
def test_a_day_that_no_city_is_left_on_has_to_be_served_as_zeros(
    monkeypatch: pytest.MonkeyPatch, day: dict[str, int], differences: int
) -> None:
    """Every day of a range is served of a country with data in it; of a day without, anything but zeros is named."""
    served = {"country_name": "Peru", "exist_accident": False, "average_delay_s": 0.0}
    known = {**served, "bus_count": 2, "passenger_count": 7, "exist_accident": True, "average_delay_s": 42.5}
    monkeypatch.setattr(oracle, "fetch", lambda _: {"peru": {DATE: known, NEXT_DATE: {**served, **day}}})
    judge = Judge(Bucket(), None)
    judge.served("http://api", {DATE, NEXT_DATE}, {("Peru", DATE): [2, 7, 1, 85_000]}, "served")
    assert len(judge.differences) == differences, judge.differences


def test_a_topic_is_joined_by_the_highest_revision() -> None:
    """A stale record that comes last changes nothing; a retraction of a higher revision takes the city away."""
    judge = Judge(Bucket(), None)
    contribution = {"trips": 2, "passengers": 7, "accidents": 1, "delay_total_ms": 85_000}

    def event(kind: str, revision: int, **more: Any) -> dict[str, Any]:
        return {"type": kind, "date": DATE, "country": "peru", "city_id": "7", "revision": revision, **more}

    stale = event("city-day-stats", 1, country_name="Peru", contribution=dict.fromkeys(contribution, 9))
    right = event("city-day-stats", 2, country_name="Peru", contribution=contribution)
    assert judge.joined([right, stale]) == {("Peru", DATE): [2, 7, 1, 85_000]}
    assert judge.joined([right, event("city-day-retracted", 3), stale]) == {}
