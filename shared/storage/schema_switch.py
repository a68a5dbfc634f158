"""The schema switch, ``state/schema.json``: which schema version every process of a bucket writes.

An operator sets it when all processes run the new build. Without the object, the first version is written.
"""

from __future__ import annotations

from shared.domain import keys, schema
from shared.domain.objects import NewerObject, SchemaSwitch
from shared.runtime.retry import DependencyUnavailable
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository


class WrongSchemaVersion(DependencyUnavailable):
    """The bucket is written in a schema version that this build cannot write. The message says which build can."""


async def read_written_version(store: ObjectStore) -> int:
    """Return the schema version that the bucket is written in. Raises WrongSchemaVersion if this build cannot."""
    try:
        switch = await Repository(store).get(SchemaSwitch, keys.SCHEMA_SWITCH)
    except NewerObject as error:
        raise WrongSchemaVersion(f"the bucket is written in a later schema version: {error}") from error
    version = switch.schema_version if switch else schema.FIRST_VERSION
    if version < schema.oldest_written_version():
        raise WrongSchemaVersion(
            f"the bucket is written in schema version {version}, and this build cannot: upgrade to the build of "
            f"version {version + 1} first, and run its 'tripfold upgrade finalize'"
        )
    return version


async def adopt_written_version(store: ObjectStore) -> int:
    """Write the version of the bucket's switch from now on, and return it. Raises WrongSchemaVersion."""
    version = await read_written_version(store)
    schema.write_version(version)
    return version


async def finalize_upgrade(store: ObjectStore) -> int:
    """Let every process write the schema version of this build; return the version that was written before."""
    version = await read_written_version(store)
    if version < schema.SCHEMA_VERSION:

        async def switched(before: SchemaSwitch | None) -> SchemaSwitch | None:
            done = before is not None and before.schema_version >= schema.SCHEMA_VERSION
            return None if done else SchemaSwitch(schema_version=schema.SCHEMA_VERSION)

        await Repository(store).update(SchemaSwitch, keys.SCHEMA_SWITCH, switched)
    return version


async def provision_schema_switch(store: ObjectStore) -> None:
    """Let a new bucket begin with the schema version of this build. A bucket that holds anything stays as it is."""
    async for _ in store.list(""):
        return
    try:
        switch = SchemaSwitch(schema_version=schema.SCHEMA_VERSION)
        await Repository(store).compare_and_swap(keys.SCHEMA_SWITCH, switch, over=None)
    except CasConflict:
        return  # there is a switch
