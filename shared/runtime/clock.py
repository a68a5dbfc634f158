"""A clock for ages that must count the time in which the host was suspended."""

from __future__ import annotations

import math
import time
from typing import Final

_SINCE_BOOT: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""`time.monotonic` stops while a Linux host is suspended. This clock goes on, as macOS's CLOCK_MONOTONIC does."""


class SuspendCountingClock:
    """Returns seconds that never go back, and that go on while the host is suspended.

    The clock since boot does not count the time from the snapshot of a virtual machine to its return. The wall clock
    does, once it is set right; but it can also be set back. So the result is the clock since boot, put forward by as
    much as the wall clock was ever ahead of it.

    If somebody sets the wall clock forward by mistake, an age is once too long. Use this clock where that is harmless.
    """

    def __init__(self) -> None:
        self._wall_ahead_s = -math.inf

    def __call__(self) -> float:
        since_boot_s = time.clock_gettime(_SINCE_BOOT)
        self._wall_ahead_s = max(self._wall_ahead_s, time.time() - since_boot_s)
        return since_boot_s + self._wall_ahead_s


suspend_counting_s: Final = SuspendCountingClock()
