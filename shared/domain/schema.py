"""The schema version of objects and events: which versions this build reads, and which one it writes.

A build of version N reads N and every earlier version. It writes N-1 until the bucket says N, so builds of both
versions can run side by side, and the build before can return. `shared.storage.schema_switch` reads from the bucket
which version to write.

A new field is absent until its version is written: in a struct that omits defaults it has its default, elsewhere it is
``msgspec.UNSET``. The code that fills it asks `written_version` first. So the bytes of version N-1 are those that the
build before writes, and it drops no field when it writes an object again.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, cast

import msgspec

SCHEMA_VERSION = 1
"""The latest version that this build knows. Raise it with every new field or event that an older build would lose."""
FIRST_VERSION = 1


class _Versioned(Protocol):
    @property
    def schema_version(self) -> int: ...


_Value = TypeVar("_Value", bound=_Versioned)


def oldest_written_version() -> int:
    """Return the earliest version that this build can write."""
    return max(FIRST_VERSION, SCHEMA_VERSION - 1)


_written = oldest_written_version()


def written_version() -> int:
    """Return the version that this process writes."""
    return _written


def write_version(version: int) -> None:
    """Let this process write ``version`` from now on."""
    global _written  # noqa: PLW0603  # one switch for the whole process, like the level of its log
    _written = version


def stamped(value: _Value) -> _Value:
    """Return a value with the version under which it is written. A later version that it already has stays."""
    version = stamped_version(value)
    if version == value.schema_version:
        return value
    return cast("_Value", msgspec.structs.replace(cast("msgspec.Struct", value), schema_version=version))


def stamped_version(value: _Versioned) -> int:
    """Return the version under which a value is written."""
    return max(value.schema_version, _written)
