"""Opens and closes backfills, and tells which dates lack data.

``state/open-backfills.json`` names the backfills that may have work left, so that a planner needs one read to find that
there is none. A backfill is named there before its object is written, and until its last request has ended. An entry
whose object is missing is therefore harmless: its writer crashed, or is about to write the object.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import msgspec

from shared.domain import keys
from shared.domain.backfills import is_closed
from shared.domain.errors import OperatorError
from shared.domain.events import BACKGROUND, Background
from shared.domain.ids import RequestId
from shared.domain.objects import Backfill, CorruptObject, DateSelection, OpenBackfills
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository, read_plan
from shared.storage.stored_cities import read_stored_cities

OPEN_MAX = 150
"""The limit of open backfills, those of schedules included."""


class TooManyBackfills(OperatorError):
    """As many backfills as allowed are open."""


async def open_backfill(store: ObjectStore, backfill: Backfill) -> Backfill:
    """Write a backfill, which planners advance from now on; return the stored one if it exists already.

    Raises TooManyBackfills if OPEN_MAX others are open.
    """
    await add_open(store, backfill.backfill_id)
    return await Repository(store).create_if_absent(keys.backfill(backfill.backfill_id), backfill)


async def add_open(store: ObjectStore, backfill_id: RequestId) -> None:
    """Let planners advance a backfill. Raises TooManyBackfills if OPEN_MAX others are open."""

    async def add(stored: OpenBackfills | None) -> OpenBackfills:
        before = stored or OpenBackfills()
        others = [other for other in before.backfill_ids if other != backfill_id]
        if len(others) >= OPEN_MAX:
            raise TooManyBackfills(
                f"{OPEN_MAX} backfills are open, which is the limit. Wait until one has ended, or cancel one: "
                "'tripfold backfills list'"
            )
        return OpenBackfills(backfill_ids=tuple(sorted((*others, backfill_id))), additions=before.additions + 1)

    await Repository(store).update(OpenBackfills, keys.OPEN_BACKFILLS, add, counted_as="backfill")


async def remove_closed(store: ObjectStore, backfill_id: RequestId) -> None:
    """Let planners no longer advance a backfill, unless it has work left again, as after a retry."""
    repository = Repository(store)

    async def remove(stored: OpenBackfills | None) -> OpenBackfills | None:
        if stored is None or backfill_id not in stored.backfill_ids:
            return stored
        # Read after the open ones: a client names a backfill before it changes it, and this write then conflicts.
        backfill = await repository.get(Backfill, keys.backfill(backfill_id))
        if backfill is not None and not is_closed(backfill):
            return stored
        others = tuple(other for other in stored.backfill_ids if other != backfill_id)
        return msgspec.structs.replace(stored, backfill_ids=others)

    await repository.update(OpenBackfills, keys.OPEN_BACKFILLS, remove, counted_as="backfill")


async def change_backfill(
    store: ObjectStore, backfill_id: RequestId, rule: Callable[[Backfill, dt.datetime], Backfill], now: dt.datetime
) -> Backfill | None:
    """Change a backfill by a rule of `domain.backfills`; return the stored one, or None if there is none.

    One that has not ended is open afterwards. Raises NotPossible as the rule does, and TooManyBackfills.

    It is named as open before and after the change. Before, so that a crash cannot leave a running one without a name.
    After, because a planner may have removed the name of the ended one in between.
    """

    async def change(stored: Backfill | None) -> Backfill | None:
        if stored is None:
            return None
        after = rule(stored, now)
        if not after.status.ended:
            await add_open(store, backfill_id)
        return after

    changed = await Repository(store).update(Backfill, keys.backfill(backfill_id), change, counted_as="backfill")
    if changed is not None and not changed.status.ended and backfill_id not in await read_open(store):
        await add_open(store, backfill_id)
    return changed


async def read_open(store: ObjectStore) -> tuple[RequestId, ...]:
    """Return the ids of the backfills that may have work left, oldest first."""
    stored = await Repository(store).get(OpenBackfills, keys.OPEN_BACKFILLS)
    return stored.backfill_ids if stored else ()


async def is_selected(
    store: ObjectStore, selection: DateSelection, date: dt.date, wanted: Background = BACKGROUND
) -> bool:
    """Return whether a backfill of ``selection`` processes a date. An unreadable plan counts as missing data.

    A selection of stored dates leaves out those without a city that is ``wanted``.
    """
    if selection is DateSelection.ALL:
        return True
    try:
        plan = await read_plan(store, date)
    except CorruptObject:
        return True
    if selection is DateSelection.STORED:
        return bool(await read_stored_cities(store, date, wanted, plan))
    if plan is None:
        return selection is DateSelection.MISSING
    lacking = {keys.manifest(date, city.city_id) for planned in plan.countries.values() for city in planned.cities}
    async for listed in store.list(keys.manifests_of(date)):
        lacking.discard(listed.key)
    return bool(lacking)
