"""Objects and events of every released version: this build reads them, and writes them again as they were.

``make released`` records those of the version that is developed.
"""

from __future__ import annotations

import pytest

from shared.domain import events, objects, schema
from shared.domain.objects import Summary
from shared.domain.topics import Topic
from tests.released import ReleasedEvent, ReleasedObject, object_kinds, released_events, released_objects

OBJECTS = [pytest.param(one, id=f"{version}-{one.kind}") for version, one in released_objects()]
EVENTS = [pytest.param(one, id=f"{version}-{one.kind}") for version, one in released_events()]
REMEDY = (
    "a build of this schema version would lose or add something: new fields must be absent until their schema version "
    "is written (docs/how-to/add-a-statistic.md). If this version was never released, record it again: make released"
)


@pytest.fixture(autouse=True)
def _first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each object under the version that it has."""
    monkeypatch.setattr(schema, "_written", schema.FIRST_VERSION)


@pytest.mark.parametrize("released", OBJECTS)
def test_a_released_object_is_read_and_written_alike(released: ReleasedObject) -> None:
    """An object of a released version is readable, and has the same bytes when it is written again."""
    stored = objects.decode(object_kinds()[released.kind], released.body, released.key)
    assert objects.encode(stored) == released.body, REMEDY
    if isinstance(stored, Summary):
        assert objects.decode_head(released.body[:4_096], released.key).totals == stored.totals


@pytest.mark.parametrize("released", EVENTS)
def test_a_released_event_is_read_and_written_alike(released: ReleasedEvent) -> None:
    """An event of a released version is readable, and has the same key, type and bytes when it is published again."""
    event = events.decode(Topic(released.topic), released.value)
    assert events.encode(event) == released.value, REMEDY
    headers = dict(events.headers_of(event, source="test"))
    assert (event.key, headers["ce_type"].decode()) == (released.key, released.ce_type)
