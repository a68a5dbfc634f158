"""``Idempotency-Key``: a client that lost a response repeats its request with the same key, and gets the same request.

The service claims a key on S3 before it publishes anything. The claim names the id that the request will have: a new
one, or that of the request of the date that already waits. A repeated call with the key gets that id.

If the first call crashed, the repeated call publishes the request under the claimed id. If both calls run, the request
is published twice under one id, and the planner plans it once.

Libraries for this header store responses in a database or in memory. The API has no database, and several processes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Awaitable, Callable

from services.api.http.errors import IdempotencyKeyReused, InvalidParameter, InvalidRequest, quoted
from shared.domain import keys
from shared.domain.ids import RequestField, RequestId
from shared.domain.objects import BucketObject
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

HEADER = "Idempotency-Key"
VALID_FOR = dt.timedelta(hours=24)
COLLECTED_AFTER = 2 * VALID_FOR
"""gc deletes no younger claims. Only a client that uses a key again so late, at that moment, could lose its claim."""

KEY_PATTERN = "^[!-~]{1,255}$"


class Claim(BucketObject, frozen=True, kw_only=True):
    """The use of an idempotency key: the parameters of the request as a text, and its id."""

    fingerprint: str
    request_id: RequestField
    claimed_at: dt.datetime


class Claims:
    """Claims idempotency keys in the bucket."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._repository = Repository(store)
        self._clock = clock

    async def claim(
        self, key: str, fingerprint: str, choose: Callable[[], Awaitable[RequestId]], *, caller: str = ""
    ) -> RequestId:
        """Return the request id of a key. If the key is free, claim it for the id that ``choose`` returns.

        Raises InvalidRequest for a malformed key. Raises IdempotencyKeyReused if the key was claimed with another
        fingerprint less than VALID_FOR ago.
        """
        if not re.fullmatch(KEY_PATTERN, key):
            reason = "it must be 1 to 255 visible ASCII characters, without spaces"
            raise InvalidRequest(InvalidParameter(name=HEADER, reason=reason))
        object_key = keys.idempotency(hashlib.sha256(f"{caller} {key}".encode()).hexdigest())
        mine: Claim | None = None

        async def keep_or_claim(stored: Claim | None) -> Claim:
            nonlocal mine
            if stored is not None and self._clock() - stored.claimed_at < VALID_FOR:
                return stored
            if mine is None:
                mine = Claim(fingerprint=fingerprint, request_id=await choose(), claimed_at=self._clock())
            return mine

        claim = await self._repository.update(Claim, object_key, keep_or_claim)
        assert claim is not None, "keep_or_claim always returns a claim"
        return _claimed_request_id(claim, key, fingerprint)


def _claimed_request_id(claim: Claim, key: str, fingerprint: str) -> RequestId:
    if claim.fingerprint != fingerprint:
        raise IdempotencyKeyReused(
            f"{HEADER} {quoted(key)} was used for {claim.fingerprint} at {claim.claimed_at:%Y-%m-%d %H:%M} UTC, and "
            f"now comes with {fingerprint}. Use another key for a request with other parameters."
        )
    return claim.request_id
