"""Which generation of summaries is live, and which one is being built."""

from __future__ import annotations

from shared import keys, objects
from shared.objects import Current
from shared.store import ObjectStore


async def read_current(store: ObjectStore) -> Current:
    """Read which generations are live and building; the first one is, until something else is said."""
    found = await store.get(keys.CURRENT)
    return objects.decode(Current, found.body, keys.CURRENT) if found else Current()
