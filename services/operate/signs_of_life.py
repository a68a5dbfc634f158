"""Telling a rebuild that runs from one that died and left its mark in ``state/current.json``.

A rebuild writes a sign of life now and then, into an object that it alone writes, and deletes it at its end. The
pointer has no part in that: readers compare its ETag, and only the steps of the protocol change it. Nor has any clock:
who finds a mark watches the sign by its own sleep. A sign that changes is of a rebuild that lives; one that stays as it
is for as long as several signs take is of a dead one, whose mark is taken away.

A wrong guess does no harm. A rebuild that only stood still finds its token gone when it wants to flip, and fails there;
what it built until then is read by nobody. And of several that wait for one death only the first to set its own mark
goes on: a mark is taken away by its token, so none takes the mark of another that has just begun.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from services.aggregate import generations
from services.aggregate.generations import RebuildUnderWay
from shared import keys, objects
from shared.current import read_current
from shared.objects import StoredObject
from shared.patience import SurroundingsFault
from shared.store import ObjectStore

SIGN_INTERVAL_S = 10.0
SIGNS_MISSED_MAX = 3
LOOKS_PER_SIGN = 5


class SignOfLife(StoredObject, frozen=True, kw_only=True):
    """What a rebuild that runs writes over and over, under its token: a number that grows."""

    number: int


@contextlib.asynccontextmanager
async def giving_signs(store: ObjectStore, token: str, *, interval_s: float) -> AsyncIterator[None]:
    """Give a sign of life under ``token`` at once, and then every ``interval_s`` until the block ends.

    A sign that cannot be written is left out: whether the bucket can be used is for the rebuild itself to find.
    """
    ended = asyncio.Event()
    await _give(store, token, 1, interval_s)
    giving = asyncio.create_task(_go_on(store, token, ended, interval_s))
    try:
        yield
    finally:
        # The last sign is let out rather than cut off: it could arrive after the deletion.
        ended.set()
        await giving
        with contextlib.suppress(SurroundingsFault):
            await store.delete(keys.rebuild(token))


async def _go_on(store: ObjectStore, token: str, ended: asyncio.Event, interval_s: float) -> None:
    number = 1
    while not ended.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await ended.wait()
        if not ended.is_set():
            number += 1
            await _give(store, token, number, interval_s)


async def _give(store: ObjectStore, token: str, number: int, interval_s: float) -> None:
    with contextlib.suppress(SurroundingsFault, TimeoutError):
        async with asyncio.timeout(interval_s):
            await store.put(keys.rebuild(token), objects.encode(SignOfLife(number=number)))


async def clear_dead_mark(
    store: ObjectStore,
    *,
    interval_s: float,
    tell: Callable[[str], None],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Take away the mark of a rebuild that died; return at once if there is no mark.

    Raises RebuildUnderWay as soon as the rebuild gives a sign of life. ``tell`` is told what is waited for, and what
    was decided.
    """
    current = await read_current(store)
    if current.building is None or current.token is None:
        return
    what = f"the rebuild into generation {current.building}"
    silence_s = SIGNS_MISSED_MAX * interval_s
    tell(f"{what} has left its mark: watching for {silence_s:g} s whether it gives a sign of life")
    before = await _sign(store, current.token)
    for _ in range(SIGNS_MISSED_MAX * LOOKS_PER_SIGN):
        await sleep(interval_s / LOOKS_PER_SIGN)
        if (await read_current(store)).token != current.token:
            tell(f"{what} has ended, or was taken over")
            return
        if await _sign(store, current.token) not in {None, before}:
            raise RebuildUnderWay(
                f"a rebuild is under way, into generation {current.building}: it has just given a sign of life. Wait "
                f"for its end; or start this one with --take-over, and it will then fail without harm"
            )
    tell(f"{what} gave none: it is taken for dead, and its mark away. If it lives, it will fail without harm")
    await generations.abandon(store, current.token)


async def _sign(store: ObjectStore, token: str) -> bytes | None:
    found = await store.get(keys.rebuild(token))
    return None if found is None else found.body
