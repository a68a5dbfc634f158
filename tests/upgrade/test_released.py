"""The fixtures of the version that is developed have every kind of object and event."""

from __future__ import annotations

from importlib.metadata import version

from tests.released import event_kinds, object_kinds, released_events, released_objects


def test_every_kind_is_recorded() -> None:
    """A later version can be tested against every kind of object and event of this one."""
    present = version("tripfold")
    recorded = {one.kind for of, one in released_objects() if of == present}
    recorded |= {one.kind for of, one in released_events() if of == present}
    assert recorded == object_kinds().keys() | event_kinds(), "record this version again: make released"
