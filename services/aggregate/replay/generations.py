"""The pointer to the live generation of summaries, and to the one being built: ``state/current.json``.

Every change of it is a compare-and-swap. A rebuild owns the building generation by its token: if another took over,
the token is another's, and all that the first still does goes into a generation that nobody will ever read.
"""

from __future__ import annotations

import datetime as dt
import enum
import math

import msgspec

from shared.domain import keys
from shared.domain.errors import OperatorError
from shared.domain.objects import GenerationPointer
from shared.runtime import metrics
from shared.runtime.concurrency import bounded_map
from shared.runtime.retry import Retrier
from shared.storage.generation_pointer import read_current, update_pointer
from shared.storage.object_store import AdminObjectStore, ObjectStore

DELETES_AT_ONCE_MAX = 16
WATCH_INTERVAL_S = 60.0


class RebuildInProgress(OperatorError):
    """The pointer names a building generation, so another rebuild runs, or died and left it."""


class RebuildTakenOver(OperatorError):
    """This rebuild's token is no longer the pointer's: another rebuild took over, so this one must not flip."""


class GenerationInUse(OperatorError):
    """The generation is read or written, or may still be, so it cannot be dropped."""


class NoSuchGeneration(OperatorError):
    """There are no summaries of this generation."""


class GenerationState(enum.Enum):
    """What a generation is to the pointer."""

    LIVE = "live"
    BUILDING = "building"
    OLD = "old"


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A generation that has summaries or is named by the pointer."""

    number: int
    state: GenerationState
    summaries: int
    size_bytes: int


async def begin(store: AdminObjectStore, token: str, *, take_over: bool) -> GenerationPointer:
    """Make a number that was never used the building generation, under ``token``; return the pointer.

    Raises RebuildInProgress if another is being built, unless it is to be taken over.
    """

    async def change(current: GenerationPointer) -> GenerationPointer:
        if current.token == token:
            return current  # the swap of an earlier try had happened
        if current.building is not None and not take_over:
            age_s = await _pointer_age_s(store)
            raise RebuildInProgress(
                f"a rebuild into generation {current.building} began {age_s:.0f} s ago. If it still runs, wait for its "
                f"end. If it crashed, start this one with --take-over, or run 'tripfold rebuild --abandon'"
            )
        number = current.highest + 1
        return GenerationPointer(live=current.live, building=number, token=token, highest=number)

    return await update_pointer(store, change)


async def flip(store: ObjectStore, token: str, number: int) -> None:
    """Make the generation that was built under ``token`` the live one.

    Raises RebuildTakenOver if the pointer has the token of another rebuild.
    """

    async def change(current: GenerationPointer) -> GenerationPointer:
        if current.live == number:
            return current  # the swap of an earlier try had happened
        if current.token != token or current.building != number:
            raise RebuildTakenOver(
                f"generation {number} was not made live: another rebuild took over while it was being built"
            )
        return GenerationPointer(live=number, highest=current.highest)

    await update_pointer(store, change)


async def abandon(store: ObjectStore, token: str) -> None:
    """Take the building generation back if it still is that of ``token``; the live one stays."""

    async def change(current: GenerationPointer) -> GenerationPointer:
        if current.building is None or current.token != token:
            return current
        return GenerationPointer(live=current.live, highest=current.highest)

    await update_pointer(store, change)


async def rebuild_age_s(store: AdminObjectStore) -> float | None:
    """Return how long ago the rebuild began whose mark the pointer has, by the store's clock; None without a mark."""
    current = await read_current(store)
    return None if current.building is None else await _pointer_age_s(store)


async def watch_rebuild(store: AdminObjectStore, retrier: Retrier) -> None:
    """Show the age of a rebuild's mark as a metric, once a minute until asked to stop."""

    async def look() -> None:
        metrics.rebuild_age.set(await rebuild_age_s(store) or 0)

    while not retrier.stopping.is_set():
        await retrier.retry_until_available("generation", look)
        await retrier.pause(WATCH_INTERVAL_S)


async def list_generations(store: ObjectStore) -> list[Generation]:
    """Return the generations that there are, with the number and size of their summaries."""
    current = await read_current(store)
    found = []
    for number in range(1, current.highest + 1):
        summaries = size_bytes = 0
        async for listed in store.list(keys.summaries_of_generation(number)):
            summaries += 1
            size_bytes += listed.size_bytes
        if summaries or number in current.folded:
            found.append(
                Generation(number=number, state=_state(current, number), summaries=summaries, size_bytes=size_bytes)
            )
    return found


async def drop(store: AdminObjectStore, number: int, *, grace: dt.timedelta) -> int:
    """Delete the summaries of an old generation, and return how many there were.

    Raises NoSuchGeneration, and GenerationInUse for the live and the building one, and while the pointer has stood for
    less than ``grace``: a reader or an aggregate that is slow may not have seen it yet.
    """
    current = await read_current(store)
    state = _state(current, number)
    if state is not GenerationState.OLD:
        raise GenerationInUse(f"generation {number} is {state.value}: it cannot be dropped")
    await require_summaries(store, number)
    age_s = await _pointer_age_s(store)
    if age_s < grace.total_seconds():
        raise GenerationInUse(
            f"generation {number} may still be read: {keys.CURRENT} was changed {age_s:.0f} s ago; "
            f"try again when that is {grace.total_seconds():.0f} s, or give a shorter --grace-s"
        )
    return await delete_summaries(store, number)


async def delete_summaries(store: AdminObjectStore, number: int) -> int:
    """Delete all summaries of a generation, and return how many there were."""
    deleted = 0
    batch: list[str] = []
    async for listed in store.list(keys.summaries_of_generation(number)):
        batch.append(listed.key)
        if len(batch) == 1_000:
            await bounded_map(store.delete, batch, limit=DELETES_AT_ONCE_MAX)
            deleted += len(batch)
            batch = []
    await bounded_map(store.delete, batch, limit=DELETES_AT_ONCE_MAX)
    return deleted + len(batch)


async def require_summaries(store: ObjectStore, number: int) -> None:
    """Raise NoSuchGeneration unless there is a summary of the generation."""
    async for _ in store.list(keys.summaries_of_generation(number)):
        return
    raise NoSuchGeneration(f"there are no summaries of generation {number}; 'tripfold generations list' shows all")


async def _pointer_age_s(store: AdminObjectStore) -> float:
    """Return how long ago the pointer was changed, by the store's clock; without a pointer, for ever."""
    async for listed in store.list(keys.CURRENT):
        return (await store.now() - listed.last_modified).total_seconds()
    return math.inf


def _state(current: GenerationPointer, number: int) -> GenerationState:
    if number == current.live:
        return GenerationState.LIVE
    return GenerationState.BUILDING if number == current.building else GenerationState.OLD
