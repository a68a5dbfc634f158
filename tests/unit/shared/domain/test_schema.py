"""The schema version that a process writes."""

from __future__ import annotations

import datetime as dt

import pytest

from shared.domain import events, objects, schema
from shared.domain.events import ProcessRequested
from shared.domain.ids import RequestId
from shared.domain.objects import Countries


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let this build know schema version 2, and write version 1."""
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    monkeypatch.setattr(schema, "_written", 1)
    return monkeypatch


@pytest.mark.usefixtures("second")
def test_the_version_before_is_written_until_the_switch() -> None:
    """An object and an event have the version that is written when they are encoded."""
    for version in (1, 2):
        schema.write_version(version)
        assert objects.decode(Countries, objects.encode(Countries()), "a key").schema_version == version
        event = ProcessRequested(
            request_id=RequestId("018f38bf-1d00-7000-8000-000000000001"),
            date=dt.date(2024, 5, 1),
            requested_at=dt.datetime(2024, 5, 2, tzinfo=dt.UTC),
        )
        assert events.decode(event.topic, events.encode(event)).schema_version == version
        assert dict(events.headers_of(event, source="test"))["ce_type"].endswith(f".v{version}".encode())


@pytest.mark.usefixtures("second")
def test_a_later_version_stays() -> None:
    """A process that has not seen the switch yet does not label the object of another process as an earlier one."""
    later = Countries(schema_version=2)
    assert objects.decode(Countries, objects.encode(later), "a key") == later
