"""The requests of the bucket, as an operator finds them and takes up what failed in them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence

from services.api.requests.service import RequestDetail, RequestOverview, detail_of, overview_of
from shared.domain import keys
from shared.domain.errors import OperatorError
from shared.domain.events import ProcessRequested
from shared.domain.ids import RequestId, parse_request_id
from shared.domain.objects import RequestRecord
from shared.domain.requests import request_event, retried_record
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository, begin_retry

GETS_AT_ONCE_MAX = 16


class UnknownRequest(OperatorError):
    """There is no request with this id."""


async def latest_requests(store: ObjectStore, *, limit: int) -> list[RequestOverview]:
    """Return the latest requests, the latest first, at most ``limit`` of them."""
    latest: list[str] = []
    async for listed in store.list(keys.REQUESTS):
        latest.append(listed.key)
        if len(latest) == limit:
            break

    repository = Repository(store)
    records = await bounded_map(lambda key: repository.get(RequestRecord, key), latest, limit=GETS_AT_ONCE_MAX)
    return [overview_of(record) for record in records if record is not None]


async def request_detail(store: ObjectStore, request_id: str) -> RequestDetail:
    """Return all that is known of a request. Raises UnknownRequest if there is none."""
    return detail_of(await read_request(store, request_id))


async def retry_requests(
    store: ObjectStore, publisher: Publisher, request_ids: Sequence[str], *, clock: Callable[[], dt.datetime]
) -> list[ProcessRequested]:
    """Take up the failed cities of requests again, each under its own id; return what was published.

    Nothing is published unless all can be. Raises UnknownRequest, and NothingToRetry for a request that has not ended
    or has no failed city.
    """
    for record in [await read_request(store, request_id) for request_id in request_ids]:
        retried_record(record, clock())
    retried = [await retry_request(store, request_id, clock()) for request_id in request_ids]
    await publisher.publish(map(OutgoingEvent, retried))
    return retried


async def retry_request(
    store: ObjectStore, text: str, now: dt.datetime, *, positions: int | None = None
) -> ProcessRequested:
    """Record the retry of a request; return what is to be published. Raises UnknownRequest and NothingToRetry."""
    request_id = parse_request_id(text)
    record = await begin_retry(store, request_id, now, positions=positions) if request_id else None
    if record is None:
        raise UnknownRequest(f"there is no request {text[:100]!r}; 'tripfold requests list' shows the latest")
    return request_event(record)


async def read_request(store: ObjectStore, text: str) -> RequestRecord:
    """Read the record of the request whose id ``text`` spells. Raises UnknownRequest if there is none."""
    request_id: RequestId | None = parse_request_id(text)
    if request_id is not None:
        record = await Repository(store).get(RequestRecord, keys.request(request_id))
        if record is not None:
            return record
    raise UnknownRequest(f"there is no request {text[:100]!r}; 'tripfold requests list' shows the latest")
