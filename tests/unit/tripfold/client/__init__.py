"""The commands for users, over the API."""

from __future__ import annotations

import re

ID = re.compile(r"^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.MULTILINE)


def id_in(output: str) -> str:
    """Return the id that a command has printed on a line of its own. The API in the test logs to the same output."""
    (found,) = ID.findall(output)
    return str(found)
