"""The switch of the schema version in the bucket."""

from __future__ import annotations

import pytest

from shared.domain import keys, objects, schema
from shared.domain.ids import utc_now
from shared.domain.objects import Countries, SchemaSwitch
from shared.storage.schema_switch import (
    WrongSchemaVersion,
    adopt_written_version,
    finalize_upgrade,
    provision_schema_switch,
    read_written_version,
)
from tests.fakes.store import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    """Return an empty bucket."""
    return MemoryStore(utc_now)


def use_build(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Let this process be a build that knows ``version``."""
    monkeypatch.setattr(schema, "SCHEMA_VERSION", version)
    monkeypatch.setattr(schema, "_written", schema.oldest_written_version())


async def test_a_build_writes_the_version_before_until_the_upgrade_is_finalized(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket of build 1 is written in version 1 by build 2, and in version 2 after the switch; then build 1 stops."""
    await provision_schema_switch(store)
    use_build(monkeypatch, 2)
    assert (await adopt_written_version(store), schema.written_version()) == (1, 1)
    assert (await finalize_upgrade(store), await finalize_upgrade(store)) == (1, 2)
    assert (await adopt_written_version(store), schema.written_version()) == (2, 2)
    use_build(monkeypatch, 1)
    with pytest.raises(WrongSchemaVersion, match="schema version 2; this build knows 1: upgrade it"):
        await adopt_written_version(store)


async def test_a_build_that_skips_a_version_is_refused(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that can write neither the bucket's version nor the one before says which build comes first."""
    use_build(monkeypatch, 3)
    for action in (read_written_version, finalize_upgrade):
        with pytest.raises(WrongSchemaVersion, match="upgrade to the build of version 2 first"):
            await action(store)
    assert store.objects == {}


async def test_a_new_bucket_begins_with_the_version_of_its_build(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new bucket needs no switch; one that holds objects of an earlier build keeps its version."""
    use_build(monkeypatch, 2)
    await provision_schema_switch(store)
    await provision_schema_switch(store)
    assert await read_written_version(store) == 2
    older = MemoryStore(utc_now)
    older.write(keys.COUNTRIES, objects.encode(Countries()))
    await provision_schema_switch(older)
    assert (list(older.objects), await read_written_version(older)) == ([keys.COUNTRIES], 1)


async def test_the_switch_never_goes_back(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operators who finalize at once, or one who repeats it, leave the later version."""
    use_build(monkeypatch, 2)
    store.write(keys.SCHEMA_SWITCH, objects.encode(SchemaSwitch(schema_version=2)))
    before = store.objects[keys.SCHEMA_SWITCH]
    assert await finalize_upgrade(store) == 2
    assert store.objects[keys.SCHEMA_SWITCH] == before
