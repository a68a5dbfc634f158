"""Content negotiation by ``Accept`` and ``Accept-Encoding``. Pure.

Litestar's ``Accept`` parser accepts types with ``q=0``, and it has none for ``Accept-Encoding``.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from litestar.exceptions import HTTPException

PREFERENCES_MAX = 50


class NotAcceptable(HTTPException):
    """The client accepts none of the offered media types."""

    status_code = HTTPStatus.NOT_ACCEPTABLE


def media_type(accept: str, offered: Sequence[str]) -> str:
    """Return the offered media type that ``accept`` ranks highest, the first one among equals.

    An empty ``accept`` accepts every type. Raises NotAcceptable if it accepts none of those offered.
    """
    if not accept.strip():
        return offered[0]
    ranks = _ranks(accept)
    found = {one: _rank(ranks, (one, f"{one.partition('/')[0]}/*", "*/*")) or 0.0 for one in offered}
    best = max(offered, key=lambda one: found[one])
    if found[best] == 0:
        raise NotAcceptable(f"Accept allows none of the available media types. Use one of these: {', '.join(offered)}.")
    return best


def content_coding(accept_encoding: str, offered: Sequence[str]) -> str:
    """Return the offered coding that is ranked highest, the first one among equals, or ``identity``."""
    ranks = _ranks(accept_encoding)
    found = {one: _rank(ranks, (one, "*")) or 0.0 for one in offered}
    best = max(offered, key=lambda one: found[one])
    return best if found[best] > ranks.get("identity", 0.0) else "identity"


def _rank(ranks: dict[str, float], names: Sequence[str]) -> float | None:
    return next((ranks[name] for name in names if name in ranks), None)


def _ranks(header: str) -> dict[str, float]:
    ranks: dict[str, float] = {}
    for preference in header.lower().split(",")[:PREFERENCES_MAX]:
        name, *parameters = (part.strip() for part in preference.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            rank = float(quality)
        except ValueError:
            continue
        if name and 0 <= rank <= 1:
            ranks[name] = max(rank, ranks.get(name, 0.0))
    return ranks
