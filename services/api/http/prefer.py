"""``Prefer: wait=N`` (RFC 7240): how long a client would have the answer held until it says more. Pure."""

from __future__ import annotations

import re

WAIT_MAX_S = 60

_WAIT = re.compile(r'\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(;.*)?', re.IGNORECASE)


def wait_s(prefer: str) -> int | None:
    """Return the seconds that are waited, WAIT_MAX_S at most, or None if that is not asked for.

    A preference that is not understood is no error: it is as if it was not there.
    """
    matches = (_WAIT.fullmatch(preference) for preference in prefer.split(","))
    return next((min(int(match[1]), WAIT_MAX_S) for match in matches if match), None)
