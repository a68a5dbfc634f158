"""The list of `tripfold requests list`."""

from __future__ import annotations

import asyncio
import contextlib
import io

import msgspec
import pytest
from rich.console import Console

from shared.domain import keys, objects
from shared.domain.ids import RequestId, utc_now
from shared.domain.objects import RequestRecord
from shared.domain.requests import Caller, Status, with_action
from shared.runtime.settings import Settings
from tests.fakes.api import NOW, record_of
from tests.fakes.store import MemoryStore
from tripfold.operate import requests
from tripfold.operate.requests import audited_overview, list_command, records_of, show_command


@pytest.mark.parametrize(("width", "with_time"), [(80, False), (1_000, True)])
def test_the_list_of_requests_is_cut_in_no_terminal(width: int, *, with_time: bool) -> None:
    """Id, date, status and counts are whole in 80 columns; a wide terminal also has the time of the request."""
    one = audited_overview(audited_record())
    counts = msgspec.structs.replace(one.counts, cities_done=1_000, cities_total=1_000, cities_failed=2)
    one = msgspec.structs.replace(one, status=Status.COMPLETED_WITH_FAILURES, counts=counts)
    written = io.StringIO()
    Console(file=written, width=width).print(records_of([one], width=width).table())
    words = written.getvalue().replace("│", " ").split()
    assert {one.id, str(one.date), "completed", "failures", "1000/1000,", "failed"} <= set(words)
    assert "…" not in written.getvalue()
    assert ("requested" in written.getvalue()) is with_time
    assert ("nightly," in words) is with_time


def audited_record() -> RequestRecord:
    """Return a request that a key requested and a client without a key joined."""
    record = with_action(record_of(), Caller(key="nightly", client="10.0.0.7"), "process", result="accepted", at=NOW)
    return with_action(record, Caller(client="10.0.0.8"), "process", result="joined", at=NOW, parameters="date=x")


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
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split("\t")[0] == record.request_id
    assert f"{damaged} is not listed" in err


def test_a_request_shows_who_acted_on_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command shows each action with its time, the key, the address, the parameters and the result."""
    store, record = MemoryStore(utc_now), audited_record()
    asyncio.run(store.put(keys.request(record.request_id), objects.encode(record)))
    monkeypatch.setattr(requests, "open_bucket", lambda _: contextlib.nullcontext(store))
    monkeypatch.setattr(requests, "command_settings", Settings)
    show_command(record.request_id)
    printed = " ".join(capsys.readouterr().out.split())
    assert "2024-06-01 12:30:00 process by key nightly, 10.0.0.7: accepted" in printed
    assert "2024-06-01 12:30:00 process date=x by 10.0.0.8: joined" in printed
