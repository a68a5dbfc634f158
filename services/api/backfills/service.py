"""Makes, reads, lists and changes backfills. Planners advance them.

The order of effects when a backfill is accepted: its idempotency key, if it has one, is claimed; the backfill is named
as open; its object is written. A second call with the key continues under the same id.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal

import msgspec

from services.api.http.deadline import deadline
from services.api.http.errors import Conflict, NotFound, quoted
from services.api.http.unreadable import UnreadableObject, get_if_readable
from services.api.requests.event_stream import EventStream, StreamPlaces
from services.api.requests.idempotency import Claims
from shared.domain import bitmap, keys
from shared.domain.backfills import (
    MAX_PARALLEL_DEFAULT,
    BackfillCounts,
    NotPossible,
    cancelled,
    counts_of,
    date_at,
    dates_per_hour,
    dates_total,
    estimated_end,
    is_closed,
    new_backfill,
    paused,
    request_id_of,
    resumed,
    retried,
)
from shared.domain.events import BACKGROUND, Background, Source
from shared.domain.ids import RequestId, mint_request_id, parse_request_id
from shared.domain.objects import Backfill, BackfillStatus, DateSelection
from shared.domain.requests import NOBODY, Caller, with_action
from shared.runtime.concurrency import bounded_map
from shared.storage.backfills import TooManyBackfills, change_backfill, is_selected, open_backfill
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

DEADLINE_S = 10.0
LISTING_DEADLINE_S = 30.0
PREVIEW_DEADLINE_S = 60.0
CONCURRENT_GETS_MAX = 16
DATES_SHOWN_MAX = 100

Order = Literal["oldest-first", "newest-first"]
Change = Literal["pause", "resume", "cancel", "retry"]
CHANGES: Mapping[Change, Callable[[Backfill, dt.datetime], Backfill]] = {
    "pause": paused,
    "resume": resumed,
    "cancel": cancelled,
    "retry": retried,
}


class BackfillDate(msgspec.Struct, frozen=True, kw_only=True):
    """A date of a backfill, and the id of its request."""

    date: dt.date
    request_id: Annotated[str, msgspec.Meta(examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"])]


class BackfillOverview(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """A backfill and its progress."""

    id: Annotated[str, msgspec.Meta(examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"])]
    first: dt.date
    last: dt.date
    only: Annotated[DateSelection, msgspec.Meta(description="The dates that are processed.")]
    order: Order
    max_parallel: Annotated[int, msgspec.Meta(ge=1, description="The most dates that are processed at once.")]
    source: Annotated[Source, msgspec.Meta(description="Where its files are read: `bucket` reads stored files again.")]
    country: Annotated[str | None, msgspec.Meta(description="The only country that it reads; null: all.")]
    city: Annotated[str | None, msgspec.Meta(description="The only city that it reads; null: all.")]
    schedule: Annotated[str | None, msgspec.Meta(description="The schedule that made it; null: a client did.")]
    status: Annotated[BackfillStatus, msgspec.Meta(description="The last three are final, unless it is retried.")]
    created_at: dt.datetime
    updated_at: Annotated[dt.datetime, msgspec.Meta(description="The time of the latest progress.")]
    version: Annotated[int, msgspec.Meta(ge=1, description="Increases with every change.", examples=[12])]
    counts: Annotated[
        BackfillCounts,
        msgspec.Meta(
            description="The dates by their state. A date with a failed city has failed. A skipped date was not in "
            "`only`. The rest was not looked at yet."
        ),
    ]
    dates_per_hour: Annotated[
        float | None, msgspec.Meta(description="Since it was started or resumed; null: no date has ended since.")
    ]
    estimated_end: Annotated[
        dt.datetime | None, msgspec.Meta(description="At this speed; null: unknown, or it does not run.")
    ]


class BackfillDetail(BackfillOverview, frozen=True, kw_only=True):
    """A backfill, its progress, and the requests of its dates under way and of its failed dates."""

    under_way: Annotated[tuple[BackfillDate, ...], msgspec.Meta(description="The dates that are processed now.")]
    failed: Annotated[
        tuple[BackfillDate, ...],
        msgspec.Meta(description=f"The first {DATES_SHOWN_MAX} failed dates. Their requests name the failed cities."),
    ]


class BackfillPreview(msgspec.Struct, frozen=True, kw_only=True):
    """The dates that a backfill would process."""

    dates_total: Annotated[int, msgspec.Meta(ge=0, description="Dates of the range.")]
    dates_selected: Annotated[int, msgspec.Meta(ge=0, description="Those among them that would be processed.")]
    dates: Annotated[
        tuple[dt.date, ...], msgspec.Meta(description=f"The first {DATES_SHOWN_MAX} of these, in their order.")
    ]


class BackfillList(msgspec.Struct, frozen=True, kw_only=True):
    """Backfills, newest first."""

    backfills: tuple[BackfillOverview, ...]
    unreadable: Annotated[tuple[UnreadableObject, ...], msgspec.Meta(description="Backfills that cannot be read.")]
    next: Annotated[
        str | None,
        msgspec.Meta(
            description="The path of the next page; null: this is the last page.",
            examples=["/backfills?limit=50&after=018f3d2a-5c00-7aaa-8bbb-0123456789ab"],
        ),
    ]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A new backfill as a client asks for it."""

    first: dt.date
    last: dt.date
    selection: DateSelection = DateSelection.ALL
    newest_first: bool = False
    max_parallel: int = MAX_PARALLEL_DEFAULT
    background: Background = BACKGROUND

    def backfill(self, backfill_id: RequestId, now: dt.datetime) -> Backfill:
        """Return the backfill."""
        return new_backfill(
            backfill_id,
            self.first,
            self.last,
            now=now,
            selection=self.selection,
            newest_first=self.newest_first,
            max_parallel=self.max_parallel,
            background=self.background,
        )


class Backfills:
    """Reads and changes the backfills of the bucket."""

    def __init__(self, store: ObjectStore, claims: Claims, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._repository = Repository(store)
        self._claims = claims
        self._clock = clock

    async def accept(self, wanted: Wanted, *, idempotency_key: str | None = None, by: Caller = NOBODY) -> Backfill:
        """Make a backfill and return it. The same idempotency key of a client returns the same one.

        Raises Conflict if too many are open, and as `Claims.claim` does.
        """
        now = self._clock()

        async def mint() -> RequestId:
            return mint_request_id(now)

        async with deadline(DEADLINE_S, "Writing the backfill"):
            backfill_id = await mint()
            if idempotency_key is not None:
                backfill_id = await self._claims.claim(idempotency_key, _fingerprint(wanted), mint, caller=by.key)
            try:
                backfill = wanted.backfill(backfill_id, now)
                made = with_action(backfill, by, "make", result="accepted", at=now, parameters=_fingerprint(wanted))
                return await open_backfill(self._store, made)
            except TooManyBackfills as error:
                raise Conflict(str(error)) from error

    async def preview(self, wanted: Wanted) -> BackfillPreview:
        """Return the dates that a backfill would process. Reads the plan and lists the manifests of each date."""
        backfill = wanted.backfill(mint_request_id(self._clock()), self._clock())
        dates = [date_at(backfill, position) for position in range(dates_total(backfill))]
        async with deadline(PREVIEW_DEADLINE_S, "Looking at the data of the dates"):
            selected = await bounded_map(
                lambda date: is_selected(self._store, wanted.selection, date, wanted.background),
                dates,
                limit=CONCURRENT_GETS_MAX,
            )
        chosen = [date for date, is_one in zip(dates, selected, strict=True) if is_one]
        return BackfillPreview(
            dates_total=len(dates), dates_selected=len(chosen), dates=tuple(chosen[:DATES_SHOWN_MAX])
        )

    async def read(self, text: str) -> Backfill:
        """Return a backfill by the text of its id. Raises NotFound if there is none."""
        backfill_id = parse_request_id(text)
        async with deadline(DEADLINE_S, "Reading the backfill"):
            found = await self._repository.get(Backfill, keys.backfill(backfill_id)) if backfill_id else None
        if found is None:
            raise _no_such_backfill(text)
        return found

    async def change(self, text: str, change: Change, *, by: Caller = NOBODY) -> Backfill:
        """Change a backfill, and return it.

        Raises NotFound if there is none, and Conflict if its state does not allow the change.
        """
        backfill_id = parse_request_id(text)

        def acted(backfill: Backfill, now: dt.datetime) -> Backfill:
            after = CHANGES[change](backfill, now)
            if after is backfill:
                return backfill
            return with_action(after, by, change, result=after.status.value, at=now)

        try:
            async with deadline(DEADLINE_S, "Changing the backfill"):
                changed = await change_backfill(self._store, backfill_id, acted, self._clock()) if backfill_id else None
        except (NotPossible, TooManyBackfills) as error:
            raise Conflict(str(error)) from error
        if changed is None:
            raise _no_such_backfill(text)
        return changed

    async def latest(self, limit: int, *, after: RequestId | None = None) -> BackfillList:
        """Return the latest backfills, newest first, at most ``limit``; with ``after``, those made before that one."""
        async with deadline(LISTING_DEADLINE_S, "Reading the latest backfills"):
            listed: list[str] = []
            async for one in self._store.list(keys.BACKFILLS, after=keys.backfill(after) if after else ""):
                listed.append(one.key)
                if len(listed) > limit:
                    break
            read = partial(get_if_readable, self._store, Backfill)
            found = await bounded_map(read, listed[:limit], limit=CONCURRENT_GETS_MAX)
        last = keys.parse_backfill(listed[limit - 1]) if len(listed) > limit else None
        return BackfillList(
            backfills=tuple(overview_of(one) for one in found if isinstance(one, Backfill)),
            unreadable=tuple(one for one in found if isinstance(one, UnreadableObject)),
            next=f"/backfills?limit={limit}&after={last}" if last else None,
        )


def overview_of(backfill: Backfill) -> BackfillOverview:
    """Return the fields of a backfill that a list shows."""
    return BackfillOverview(
        id=backfill.backfill_id,
        first=backfill.first,
        last=backfill.last,
        only=backfill.selection,
        order="newest-first" if backfill.newest_first else "oldest-first",
        max_parallel=backfill.max_parallel,
        source=backfill.source,
        country=backfill.background.country,
        city=backfill.background.city_id,
        schedule=backfill.schedule,
        status=backfill.status,
        created_at=backfill.created_at,
        updated_at=backfill.updated_at,
        version=backfill.version,
        counts=counts_of(backfill),
        dates_per_hour=dates_per_hour(backfill),
        estimated_end=estimated_end(backfill),
    )


def detail_of(backfill: Backfill) -> BackfillDetail:
    """Return all fields of a backfill that the API shows."""
    return BackfillDetail(
        **msgspec.structs.asdict(overview_of(backfill)),
        under_way=tuple(_date_of(backfill, position) for position in backfill.under_way),
        failed=tuple(_date_of(backfill, position) for position in bitmap.members(backfill.failed)[:DATES_SHOWN_MAX]),
    )


def _date_of(backfill: Backfill, position: int) -> BackfillDate:
    date = date_at(backfill, position)
    return BackfillDate(date=date, request_id=request_id_of(backfill, date))


def _fingerprint(wanted: Wanted) -> str:
    order = "newest-first" if wanted.newest_first else "oldest-first"
    chosen = "".join(f"&{name}={value}" for name, value in msgspec.to_builtins(wanted.background).items())
    return (
        f"from={wanted.first}&to={wanted.last}&only={wanted.selection.value}&order={order}"
        f"&max_parallel={wanted.max_parallel}{chosen}"
    )


def _no_such_backfill(text: str) -> NotFound:
    return NotFound(f"There is no backfill with the id {quoted(text)}. GET /backfills lists them.")


def backfill_stream(backfills: Backfills, places: StreamPlaces) -> EventStream[Backfill]:
    """Return the streams of backfills."""
    return EventStream(places, lambda backfill: backfills.read(backfill.backfill_id), is_closed, detail_of)
