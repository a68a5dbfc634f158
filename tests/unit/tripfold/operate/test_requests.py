"""The list of `tripfold requests list`."""

from __future__ import annotations

import asyncio
import contextlib
import io

import msgspec
import pytest
from rich.console import Console

from services.api.requests.service import overview_of
from shared.domain import keys, objects
from shared.domain.ids import RequestId, utc_now
from shared.domain.requests import Status
from shared.runtime.settings import Settings
from tests.fakes.api import record_of
from tests.fakes.store import MemoryStore
from tripfold.operate import requests
from tripfold.operate.requests import list_command, requests_table


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


def test_an_unreadable_request_is_named_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command lists the other requests, and says which one it leaves out and why."""
    store, record = MemoryStore(utc_now), record_of()
    damaged = keys.request(RequestId("018f38bf-1d00-7000-8000-000000000009"))
    asyncio.run(store.put(keys.request(record.request_id), objects.encode(record)))
    asyncio.run(store.put(damaged, b"{"))
    monkeypatch.setattr(requests, "open_bucket", lambda _: contextlib.nullcontext(store))
    monkeypatch.setattr(requests, "command_settings", Settings)
    list_command()
    printed = capsys.readouterr().out
    assert record.request_id in printed
    assert f"{damaged} is not listed" in printed.replace("\n", "")
