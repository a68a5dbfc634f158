"""The rules of backfills: orders, ids, counts, and what pausing, cancelling and retrying make of a state."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.backfills import (
    DATES_MAX,
    DateEnd,
    NotPossible,
    cancelled,
    concluded,
    counts_of,
    date_at,
    dates_per_hour,
    dates_total,
    estimated_end,
    free_slots,
    new_backfill,
    paused,
    positions_to_retry,
    request_id_of,
    resumed,
    retried,
    touched,
    with_end,
    with_request,
)
from shared.domain.ids import RequestId, mint_request_id, parse_request_id, request_time_ms
from shared.domain.objects import Backfill, BackfillStatus, encode

NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
FIRST = dt.date(2023, 12, 30)
BACKFILL_ID = RequestId("018f38bf-1d00-7000-8000-000000000001")
HOUR = dt.timedelta(hours=1)


def of_days(days: int, *, newest_first: bool = False, max_parallel: int = 2) -> Backfill:
    """Return a new backfill of some days."""
    last = FIRST + dt.timedelta(days=days - 1)
    return new_backfill(BACKFILL_ID, FIRST, last, now=NOW, newest_first=newest_first, max_parallel=max_parallel)


@given(days=st.integers(1, 800), newest_first=st.booleans())
def test_each_date_has_one_position_and_an_id_of_its_own(days: int, newest_first: bool) -> None:
    """Positions cover the range in order, and ids are those of the creation time, valid and different."""
    backfill = of_days(days, newest_first=newest_first)
    dates = [date_at(backfill, position) for position in range(dates_total(backfill))]
    assert sorted(dates, reverse=newest_first) == dates
    assert set(dates) == {FIRST + dt.timedelta(days=day) for day in range(days)}
    ids = [request_id_of(backfill, date) for date in dates]
    assert len(set(ids)) == days
    assert all(parse_request_id(one) and request_time_ms(one) == NOW.timestamp() * 1000 for one in ids)


def test_another_backfill_of_the_same_time_has_other_ids() -> None:
    """The ids of requests depend on the backfill, not only on the date."""
    other = new_backfill(mint_request_id(NOW), FIRST, FIRST, now=NOW)
    assert request_id_of(other, FIRST) != request_id_of(of_days(1), FIRST)


@given(
    days=st.integers(1, 12),
    max_parallel=st.integers(1, 4),
    ends=st.lists(st.sampled_from([DateEnd.COMPLETED, DateEnd.FAILED]), min_size=12, max_size=12),
)
def test_a_backfill_ends_when_every_date_has(days: int, max_parallel: int, ends: list[DateEnd]) -> None:
    """Whatever dates end as, the counts add up at each step, no slot is used twice, and a retry ends the rest."""
    backfill = of_days(days, max_parallel=max_parallel)
    for _ in range(2):
        while not backfill.status.ended:
            chosen = positions_to_retry(backfill) or list(range(backfill.cursor, days))
            for position in chosen[: free_slots(backfill)]:
                backfill = with_request(backfill, position)
            assert 0 < len(backfill.under_way) <= max_parallel
            position = min(backfill.under_way)
            backfill = concluded(with_end(backfill, position, ends[position]))
            counts = counts_of(backfill)
            assert counts.left == days - counts.dates_completed - counts.dates_failed
        failed = [position for position in range(days) if ends[position] is DateEnd.FAILED]
        expected = BackfillStatus.COMPLETED_WITH_FAILURES if failed else BackfillStatus.COMPLETED
        assert (backfill.status, counts_of(backfill).dates_failed) == (expected, len(failed))
        if not failed:
            return
        backfill = retried(backfill, NOW)
        assert (positions_to_retry(backfill), backfill.status) == (failed, BackfillStatus.RUNNING)
        ends = [DateEnd.COMPLETED] * 12


def test_the_throughput_counts_from_the_start_or_the_latest_resumption() -> None:
    """Six dates in an hour are six an hour; a pause does not lower the rate, and skipped dates do not raise it."""
    before = of_days(12)
    after = before
    for position in range(6):
        after = with_end(after, position, DateEnd.COMPLETED)
    after = with_end(after, 6, DateEnd.SKIPPED)
    after = touched(before, after, NOW + HOUR)
    assert (dates_per_hour(after), estimated_end(after)) == (6.0, NOW + HOUR + dt.timedelta(minutes=50))
    again = resumed(paused(after, NOW + 2 * HOUR), NOW + 3 * HOUR)
    assert (dates_per_hour(again), estimated_end(again)) == (None, None)
    slow = msgspec.structs.replace(after, updated_at=NOW + dt.timedelta(days=1_500_000), counted=1)
    assert estimated_end(slow) is None
    more = touched(again, with_end(again, 7, DateEnd.COMPLETED), NOW + 4 * HOUR)
    assert dates_per_hour(more) == 1.0


def test_no_slot_is_free_while_a_backfill_is_paused() -> None:
    """A paused backfill requests nothing, and goes on when resumed."""
    backfill = paused(of_days(3), NOW)
    assert (free_slots(backfill), backfill.version) == (0, 2)
    assert free_slots(resumed(backfill, NOW)) == 2
    assert paused(backfill, NOW) is backfill


def test_impossible_operations_are_refused() -> None:
    """The message names the backfill and its state."""
    done = concluded(with_end(of_days(1), 0, DateEnd.COMPLETED))
    for rule in (paused, resumed, cancelled, retried):
        with pytest.raises(NotPossible, match=f"backfill {BACKFILL_ID} is completed; "):
            rule(done, NOW)
    stopped = cancelled(of_days(1), NOW)
    assert cancelled(stopped, NOW) is stopped
    with pytest.raises(NotPossible, match="was cancelled; make a new one"):
        retried(stopped, NOW)


def test_a_backfill_of_the_most_dates_stays_small() -> None:
    """With every bitmap full, the longest backfill takes less than 8 KiB, which each step reads and writes."""
    backfill = of_days(DATES_MAX, max_parallel=16)
    for position in range(DATES_MAX):
        backfill = with_end(backfill, position, list(DateEnd)[position % 4])
    assert len(encode(backfill)) < 8 * 1024
