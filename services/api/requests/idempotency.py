"""``Idempotency-Key``: a client that does not know whether it was heard asks again, and gets the same request.

A key is claimed on S3 before anything is published, for the id that the request is going to have: a new one, or that
of the request of the date that waits already. Whoever comes again with the key takes that id: if the first one died on
the way, the request is published under it now, and if both are under way it is published twice under one id, which the
planner plans once.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Awaitable, Callable

from services.api.http.errors import IdempotencyKeyReused, InvalidParameter, InvalidRequest, shown
from shared.domain import keys, objects
from shared.domain.ids import RequestField, RequestId
from shared.domain.objects import BucketObject
from shared.storage.object_store import CasConflict, ObjectStore, StoreUnavailable

HEADER = "Idempotency-Key"
VALID_FOR = dt.timedelta(hours=24)
RACES_MAX = 5

KEY_PATTERN = "^[!-~]{1,255}$"


class Claim(BucketObject, frozen=True, kw_only=True):
    """What an idempotency key was used for: the parameters, as a text, and the request."""

    fingerprint: str
    request_id: RequestField
    claimed_at: dt.datetime


class Claims:
    """The idempotency keys that were used."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._clock = clock

    async def claim(
        self, key: str, fingerprint: str, choose: Callable[[], Awaitable[RequestId]], *, caller: str = ""
    ) -> RequestId:
        """Return the id of the request that has a key; if it is free, claim it for the id that ``choose`` returns.

        Raises IdempotencyKeyReused if it was claimed with another fingerprint less than VALID_FOR ago.
        """
        if not re.fullmatch(KEY_PATTERN, key):
            reason = "it has to be 1 to 255 visible ASCII characters, without spaces"
            raise InvalidRequest(InvalidParameter(name=HEADER, reason=reason))
        place = keys.idempotency(hashlib.sha256(f"{caller} {key}".encode()).hexdigest())
        mine: Claim | None = None
        for _ in range(RACES_MAX):
            found = await self._store.get(place)
            if found is not None:
                theirs = objects.decode(Claim, found.body, place)
                if self._clock() - theirs.claimed_at < VALID_FOR:
                    return _same_or_refused(theirs, key, fingerprint)
            if mine is None:
                mine = Claim(fingerprint=fingerprint, request_id=await choose(), claimed_at=self._clock())
            try:
                await self._store.compare_and_swap(place, objects.encode(mine), etag=found.etag if found else None)
            except CasConflict:
                continue
            return mine.request_id
        raise StoreUnavailable(f"{place} was written by others {RACES_MAX} times")


def _same_or_refused(claim: Claim, key: str, fingerprint: str) -> RequestId:
    if claim.fingerprint != fingerprint:
        raise IdempotencyKeyReused(
            f"{HEADER} {shown(key)} was used for {claim.fingerprint} at {claim.claimed_at:%Y-%m-%d %H:%M} UTC, and now "
            f"comes with {fingerprint}: a request with other parameters needs another key."
        )
    return claim.request_id
