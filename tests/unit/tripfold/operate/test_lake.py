"""``tripfold lake build``: which months it builds, and what it does when others build too."""

from __future__ import annotations

import datetime as dt

import pytest

from services.aggregate.bucket_reader import Dates
from shared.domain.errors import OperatorError
from shared.domain.tables import COUNTRY_DAYS
from shared.storage.object_store import CasConflict
from tests.fakes.bucket import ALL, DAY, FakeBucket
from tests.fakes.store import MemoryStore
from tripfold.operate.lake import build_tables

JULY = dt.date(2024, 7, 31)


@pytest.fixture
async def bucket() -> FakeBucket:
    """Give a planned day in each of two months."""
    bucket = FakeBucket()
    for date in (DAY, JULY):
        await bucket.fold(bucket.plan(1, {"armenia": (1,)}, date))
    return bucket


async def built(store: MemoryStore, dates: Dates = ALL, *, again: bool = False) -> tuple[list[str], int]:
    reports: list[tuple[int, int]] = []
    result = await build_tables(store, dates, again=again, report=lambda *one: reports.append(one))
    assert reports == [(done, len(result.built)) for done in range(len(result.built))]
    return list(result.built), result.current


async def test_changed_months_are_built_once(bucket: FakeBucket) -> None:
    """A second run finds them current; --again builds them all the same."""
    assert await built(bucket.store) == (["2024-05", "2024-07"], 0)
    assert await built(bucket.store) == ([], 2)
    assert await built(bucket.store, again=True) == (["2024-05", "2024-07"], 0)


@pytest.mark.parametrize(
    ("dates", "months"),
    [
        (Dates(DAY, dt.date(2024, 5, 2)), ["2024-05"]),
        (Dates(dt.date(2024, 5, 2), None), ["2024-05", "2024-07"]),
        (Dates(dt.date(2024, 6, 1), None), ["2024-07"]),
        (Dates(None, dt.date(2024, 6, 30)), ["2024-05"]),
        (Dates(dt.date(2024, 6, 1), dt.date(2024, 6, 30)), []),
    ],
)
async def test_a_range_selects_the_months_that_it_touches(bucket: FakeBucket, dates: Dates, months: list[str]) -> None:
    """A month has one file, so it is built as a whole."""
    assert await built(bucket.store, dates) == (months, 0)


async def test_a_month_that_others_keep_writing_is_an_error(bucket: FakeBucket) -> None:
    """The command tries a few times, and says what to do."""

    class BusyStore(MemoryStore):
        async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
            if key == COUNTRY_DAYS.key("2024-05"):
                raise CasConflict(key)
            return await super().compare_and_swap(key, body, etag=etag)

    store = BusyStore(bucket.clock)
    store.objects = bucket.store.objects
    with pytest.raises(OperatorError, match=r"wrote the tables of 2024-05 5 times while they were built. Try again"):
        await built(store)
