"""The columns of the Parquet form of the statistics."""

from __future__ import annotations

from services.api.statistics.model import DayStats
from services.api.statistics.parquet_format import DETAILED, PLAIN


def test_the_columns_are_the_fields_of_a_day_in_their_order() -> None:
    """As in CSV: first the country and the date, then the fields; without details, the first four of them."""
    assert DETAILED.names == ("country", "date", *DayStats.__struct_fields__)
    assert PLAIN.names == DETAILED.names[:6]
