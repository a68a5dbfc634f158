"""Changes the pointer to the live and the building generation of summaries (``state/current.json``).

Every change is a compare-and-swap. A rebuild owns the building generation by its token. If another rebuild takes over,
the token changes, and the first one writes on into a generation that no reader will ever see.
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
    """The pointer names a building generation: another rebuild runs, or crashed."""


class RebuildTakenOver(OperatorError):
    """Another rebuild took over, and its token is in the pointer: this rebuild must not flip."""


class GenerationInUse(OperatorError):
    """The generation is in use, or may still be, so it cannot be dropped."""


class NoSuchGeneration(OperatorError):
    """The generation has no summaries."""


class GenerationState(enum.Enum):
    """Whether the pointer names a generation as live or building."""

    LIVE = "live"
    BUILDING = "building"
    OLD = "old"


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A generation that has summaries, or that the pointer names."""

    number: int
    state: GenerationState
    summaries: int
    size_bytes: int


async def begin(store: AdminObjectStore, token: str, *, take_over: bool) -> GenerationPointer:
    """Set a new building generation in the pointer, under ``token``; return the pointer.

    Its number was never used before. Raises RebuildInProgress if there is one already, unless ``take_over``.
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
        return msgspec.structs.replace(current, building=number, token=token, highest=number)

    return await update_pointer(store, change)


async def flip(store: ObjectStore, token: str, number: int) -> None:
    """Make the generation live that was built under ``token``.

    Raises RebuildTakenOver if the pointer has the token of another rebuild.
    """

    async def change(current: GenerationPointer) -> GenerationPointer:
        if current.live == number:
            return current  # the swap of an earlier try had happened
        if current.token != token or current.building != number:
            raise RebuildTakenOver(
                f"generation {number} was not made live: another rebuild took over while it was being built"
            )
        return msgspec.structs.replace(current, live=number, building=None, token=None)

    await update_pointer(store, change)


async def abandon(store: ObjectStore, token: str) -> None:
    """Remove the building generation from the pointer if it still has ``token``."""

    async def change(current: GenerationPointer) -> GenerationPointer:
        if current.building is None or current.token != token:
            return current
        return msgspec.structs.replace(current, building=None, token=None)

    await update_pointer(store, change)


async def rebuild_age_s(store: AdminObjectStore) -> float | None:
    """Return the age of the pointer's building generation by the store's clock, or None if there is none."""
    current = await read_current(store)
    return None if current.building is None else await _pointer_age_s(store)


async def watch_rebuild(store: AdminObjectStore, retrier: Retrier) -> None:
    """Export the age of a building generation as a metric, once a minute until asked to stop."""

    async def measure() -> None:
        metrics.rebuild_age.set(await rebuild_age_s(store) or 0)

    while not retrier.stopping.is_set():
        await retrier.retry_until_available("generation", measure)
        await retrier.pause(WATCH_INTERVAL_S)


async def list_generations(store: ObjectStore) -> list[Generation]:
    """Return all generations with the number and size of their summaries."""
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
    """Delete the summaries of an old generation, and return their number.

    Raises NoSuchGeneration, and GenerationInUse for the live and the building generation. It also raises this
    error until ``grace`` after the last change of the pointer: a slow reader or aggregate may not have seen it yet.
    """
    current = await read_current(store)
    state = _state(current, number)
    if state is not GenerationState.OLD:
        raise GenerationInUse(f"generation {number} is {state.value}, so it cannot be dropped")
    await require_summaries(store, number)
    age_s = await _pointer_age_s(store)
    if age_s < grace.total_seconds():
        raise GenerationInUse(
            f"generation {number} may still be read: {keys.CURRENT} was changed {age_s:.0f} s ago. "
            f"Try again {grace.total_seconds():.0f} s after the change, or give a shorter --grace-s"
        )
    return await delete_summaries(store, number)


async def delete_summaries(store: AdminObjectStore, number: int) -> int:
    """Delete all summaries of a generation, and return their number."""
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
    """Raise NoSuchGeneration unless the generation has a summary."""
    async for _ in store.list(keys.summaries_of_generation(number)):
        return
    raise NoSuchGeneration(f"generation {number} has no summaries. 'tripfold generations list' shows all generations")


async def _pointer_age_s(store: AdminObjectStore) -> float:
    """Return the time since the last change of the pointer by the store's clock; without a pointer, infinity."""
    async for listed in store.list(keys.CURRENT):
        return (await store.now() - listed.last_modified).total_seconds()
    return math.inf


def _state(current: GenerationPointer, number: int) -> GenerationState:
    if number == current.live:
        return GenerationState.LIVE
    return GenerationState.BUILDING if number == current.building else GenerationState.OLD
