"""The proof that a store refuses writes whose condition does not hold."""

from __future__ import annotations

import asyncio

import pytest

from shared.storage.conditional_writes import NEVER_AN_ETAG, ConditionalWrites, UnsafeStore
from shared.storage.object_store import CasConflict


class Store:
    """Has one object. It notes the condition of each write, and every second write never gets a response."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.has_object = False

    async def swap(self, _key: str, _body: bytes, etag: str | None) -> str:
        """Write the object if the condition holds."""
        self.asked.append(etag)
        if len(self.asked) % 2 == 0:
            await asyncio.Event().wait()
        if self.has_object or etag is not None:
            raise CasConflict("the object")
        self.has_object = True
        return '"1"'


async def test_what_a_store_has_proven_stays_proven() -> None:
    """A request without a response is repeated, and no other: so a slow store completes the proof."""
    store = Store()
    writes = ConditionalWrites("the store", store.swap)
    passed: list[bool] = []
    while not (passed and passed[-1]):
        try:
            async with asyncio.timeout(0.01):
                passed.append(await writes.check_next())
        except TimeoutError:
            continue
    assert passed == [False, False, True]
    assert store.asked == [None, None, None, NEVER_AN_ETAG, NEVER_AN_ETAG]
    await writes.require()
    assert len(store.asked) == 5


async def test_a_store_that_stops_refusing_is_proven_again() -> None:
    """After a write whose condition was ignored, each condition is checked anew."""
    asked: list[str | None] = []
    is_ignored = False

    async def swap(_key: str, _body: bytes, etag: str | None) -> str:
        asked.append(etag)
        if is_ignored:
            return '"2"'
        raise CasConflict("the object")

    writes = ConditionalWrites("the store", swap)
    await writes.require()
    is_ignored = True
    with pytest.raises(UnsafeStore, match="If-Match"):
        await writes.check_next()
    is_ignored = False
    asked.clear()
    await writes.require()
    assert asked == [None, NEVER_AN_ETAG]
