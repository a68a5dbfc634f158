"""Strong ETags: equal ones mean equal bytes. Pure. Litestar does not compare ETags."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def strong_etag(parts: Iterable[str]) -> str:
    """Return the ETag of a response that depends on ``parts`` alone."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8) + encoded)
    return f'"{digest.hexdigest()[:32]}"'


def matches(if_none_match: str, etag: str) -> bool:
    """Return whether ``If-None-Match`` lists this ETag: then the response is 304."""
    known = [one.strip().removeprefix("W/") for one in if_none_match.split(",")]
    return etag in known or known == ["*"]
