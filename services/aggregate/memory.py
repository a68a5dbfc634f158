"""How often Python looks for cycles of garbage while events are folded."""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS_MAX: Final = 50_000


def tune_collector() -> None:
    """Let Python look for cycles when 50,000 objects are new, rather than 700.

    A batch is thousands of records and events, all of them freed without that, and each look goes through those that
    are there: an eighth of the processor time of a rebuild. It takes no more memory at its peak (`bench.fold`).
    """
    gc.set_threshold(YOUNG_OBJECTS_MAX, *gc.get_threshold()[1:])
