"""Unreadable objects of the bucket: a response leaves them out and names them, and a log line and a metric count them.

A request for one object that is unreadable fails, with a problem from ``problems.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar
from urllib.parse import quote

import msgspec
import structlog

from shared.domain import keys, objects
from shared.domain.objects import BucketObject, CorruptObject, NewerObject
from shared.runtime import metrics
from shared.storage.object_store import ObjectStore

HEADER = "Tripfold-Unreadable"
NAMED_MAX = 20
NAME_LENGTH_MAX = 200

_KINDS: dict[str, metrics.ObjectKind] = {
    keys.SUMMARIES: "summary",
    keys.REQUESTS: "request",
    keys.BACKFILLS: "backfill",
    keys.SCHEDULES: "schedule",
    keys.MANIFESTS: "manifest",
    keys.PLANS: "plan",
    keys.QUARANTINE: "quarantine report",
}

_Read = TypeVar("_Read")
_Stored = TypeVar("_Stored", bound=BucketObject)
_log = structlog.get_logger()


class UnreadableObject(msgspec.Struct, frozen=True, kw_only=True):
    """An object of the bucket that cannot be read, and why. The rest of the response lacks it."""

    key: Annotated[str, msgspec.Meta(examples=["summaries/generation=1/date=2024-05-01/country=armenia.json"])]
    reason: Annotated[str, msgspec.Meta(description="Why it cannot be read, and what to do.")]


def read_if_readable(read: Callable[[], _Read]) -> _Read | UnreadableObject:
    """Return the result of ``read``; if its object is unreadable, report that and return the report."""
    try:
        return read()
    except CorruptObject as error:
        return report_unreadable(error)


async def get_if_readable(store: ObjectStore, kind: type[_Stored], key: str) -> _Stored | UnreadableObject | None:
    """Return an object of ``kind``, or None if there is none. If it is unreadable, report that; return the report."""
    found = await store.get(key)
    return read_if_readable(lambda: objects.decode(kind, found.body, key)) if found else None


def report_unreadable(error: CorruptObject) -> UnreadableObject:
    """Count and log an unreadable object; return its key, the reason, and the remedy."""
    metrics.unreadable_objects.labels(_kind_of(error.key)).inc()
    _log.error("object_unreadable", key=error.key, error=str(error))
    return UnreadableObject(key=error.key, reason=f"{error}. {_remedy_of(error)}")


class RequestedObjectUnreadable(RuntimeError):
    """The one object that a client requested cannot be read."""

    def __init__(self, unreadable: UnreadableObject) -> None:
        super().__init__(unreadable.reason)


def unreadable_header(unreadable: Iterable[UnreadableObject]) -> dict[str, str]:
    """Return the response header that names the first NAMED_MAX unreadable objects; no header if there are none."""
    names = [_name_of(one.key) for one in unreadable]
    if not names:
        return {}
    more = [f"and-{len(names) - NAMED_MAX}-more"] if len(names) > NAMED_MAX else []
    return {HEADER: ", ".join(names[:NAMED_MAX] + more)}


def _name_of(key: str) -> str:
    country_day = keys.parse_summary(key)
    name = f"{country_day[0]}/{country_day[1]}" if country_day else key
    return quote(name, safe="/=")[:NAME_LENGTH_MAX]


def _kind_of(key: str) -> metrics.ObjectKind:
    return next((kind for prefix, kind in _KINDS.items() if key.startswith(prefix)), "other")


def _remedy_of(error: CorruptObject) -> str:
    key = error.key
    if isinstance(error, NewerObject):
        return "A later version of Tripfold wrote it. Upgrade the API."
    if keys.parse_summary(key):
        date = keys.parse_date(key)
        return f"An operator can compute it again from the bucket: tripfold repair --from {date} --to {date}"
    if key.startswith(keys.REQUESTS):
        return "Request its date again, or ask an operator to restore the object from the bucket's versions."
    return "An operator can restore it from the bucket's versions. `tripfold verify` lists all damaged objects."
