"""The change index under random interleavings: what was counted before a query began is in its response."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.index_race import Race


@settings(max_examples=50)
@given(st.integers(0, 1 << 32))
async def test_a_query_has_every_change_that_was_counted_before_it(seed: int) -> None:
    """Whenever writers, gc, late writes and an older build come in between, no counted change is missing."""
    assert [one async for one in Race(random.Random(seed)).complaints()] == []
