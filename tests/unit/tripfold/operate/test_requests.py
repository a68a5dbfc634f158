"""The table of `tripfold requests list`."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from services.api.requests.service import overview_of
from shared.domain.requests import Status
from tests.fakes.api import record_of
from tripfold.operate.requests import requests_table


@pytest.mark.parametrize(("width", "with_time"), [(80, False), (1_000, True)])
def test_the_list_of_requests_is_cut_in_no_terminal(width: int, *, with_time: bool) -> None:
    """Id, date, status and counts are whole in 80 columns; a wide terminal also has the time of the request."""
    one = overview_of(record_of())
    counts = msgspec.structs.replace(one.counts, cities_done=1_000, cities_total=1_000, cities_failed=2)
    one = msgspec.structs.replace(one, status=Status.COMPLETED_WITH_FAILURES, counts=counts)
    written = io.StringIO()
    Console(file=written, width=width).print(requests_table([one], width=width))
    words = written.getvalue().replace("│", " ").split()
    assert {one.id, str(one.date), "completed", "failures", "1000/1000,", "failed"} <= set(words)
    assert "…" not in written.getvalue()
    assert ("requested" in written.getvalue()) is with_time
