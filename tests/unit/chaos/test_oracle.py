"""The oracle reports each kind of error that it looks for."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos import oracle as module
from tests.chaos.oracle import Oracle, milliseconds, sums_of

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
    """A fake of boto3's object."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def get(self) -> dict[str, Any]:
        return {"Body": io.BytesIO(self._body)}


class Bucket:
    """A fake bucket with one manifest, which the test changes, and its raw object."""

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


def test_a_correct_bucket_has_no_differences() -> None:
    """The sums of a file are those computed by hand."""
    oracle = Oracle(Bucket(), None)
    days, dates = oracle.check_stored({f"7/{DATE}": [DIGEST]})
    assert oracle.differences == []
    assert (days, dates) == ({("Peru", DATE): [2, 7, 1, 85_000]}, {DATE})
    assert sums_of(RAW) == [2, 7, 1, 85_000]
    assert milliseconds("P1DT1H") == 90_000_000


@pytest.mark.parametrize(
    ("changes", "versions", "message"),
    [
        ({"contribution": {"trips": 4, "passengers": 14, "accidents": 2, "delay_total_ms": 1}}, [DIGEST], "sums"),
        ({"sha256": "0" * 64}, [DIGEST], "SHA-256"),
        ({"size_bytes": 1}, [DIGEST], "size"),
        ({}, ["0" * 64], "a version that the upstream had"),
    ],
)
def test_a_wrong_manifest_is_reported(changes: dict[str, Any], versions: list[str], message: str) -> None:
    """The oracle compares sums, digest, size and origin, and the difference names the city-day."""
    oracle = Oracle(Bucket(**changes), None)
    oracle.check_stored({f"7/{DATE}": versions})
    assert len(oracle.differences) == 1
    assert f"7/{DATE}" in oracle.differences[0]
    assert message in oracle.differences[0]


@pytest.mark.parametrize(
    ("day", "differences"),
    [({"bus_count": 0, "passenger_count": 0}, 0), ({"bus_count": 1, "passenger_count": 0}, 1)],
    ids=["zeros", "a trip"],
)
def test_a_day_without_cities_must_be_served_as_zeros(
    monkeypatch: pytest.MonkeyPatch, day: dict[str, int], differences: int
) -> None:
    """The API serves every day of a range; a day without data that is not zero is a difference."""
    served = {"country_name": "Peru", "exist_accident": False, "average_delay_s": 0.0}
    known = {**served, "bus_count": 2, "passenger_count": 7, "exist_accident": True, "average_delay_s": 42.5}
    monkeypatch.setattr(module, "fetch", lambda _: {"peru": {DATE: known, NEXT_DATE: {**served, **day}}})
    oracle = Oracle(Bucket(), None)
    oracle.check_served("http://api", {DATE, NEXT_DATE}, {("Peru", DATE): [2, 7, 1, 85_000]}, "served")
    assert len(oracle.differences) == differences, oracle.differences


def test_the_highest_revision_of_a_topic_counts() -> None:
    """A stale last record changes nothing, and a retraction with a higher revision removes the city."""
    oracle = Oracle(Bucket(), None)
    contribution = {"trips": 2, "passengers": 7, "accidents": 1, "delay_total_ms": 85_000}

    def event(kind: str, revision: int, **more: Any) -> dict[str, Any]:
        return {"type": kind, "date": DATE, "country": "peru", "city_id": "7", "revision": revision, **more}

    stale = event("city-day-stats", 1, country_name="Peru", contribution=dict.fromkeys(contribution, 9))
    right = event("city-day-stats", 2, country_name="Peru", contribution=contribution)
    assert oracle.fold([right, stale]) == {("Peru", DATE): [2, 7, 1, 85_000]}
    assert oracle.fold([right, event("city-day-retracted", 3), stale]) == {}


@pytest.mark.parametrize(("trips", "differences"), [(1, 0), (2, 1)], ids=["right", "a trip more"])
def test_the_tables_must_add_up_to_the_manifests(trips: int, differences: int) -> None:
    """Files of several months are added up by country and date; a total that is wrong is a difference."""

    class Tables:
        def __init__(self) -> None:
            self.objects = self

        def filter(self, *, Prefix: str) -> list[Object]:  # noqa: N803  # as boto3 spells it
            return [Object(month(1)), Object(month(trips))] if Prefix == "lake/city_days/" else [Object(month(2))]

    def month(trips: int) -> bytes:
        sums = {"trips": [trips], "passengers": [trips * 3], "accidents": [0], "delay_total_ms": [trips * -5]}
        file = io.BytesIO()
        pq.write_table(pa.table({"country_name": ["Peru"], "date": [dt.date.fromisoformat(DATE)], **sums}), file)
        return file.getvalue()

    oracle = Oracle(Tables(), None)
    oracle.check_tables({("Peru", DATE): [2, 6, 0, -10]})
    assert len(oracle.differences) == differences, oracle.differences
