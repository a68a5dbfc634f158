"""The clock that counts the suspension of a host."""

from __future__ import annotations

import types

import pytest

from shared.runtime import clock
from shared.runtime.clock import SuspendCountingClock


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Return the clocks of a host, to set them."""
    clocks = types.SimpleNamespace(since_boot_s=50.0, wall_s=1_000.0)
    fake = types.SimpleNamespace(clock_gettime=lambda _: clocks.since_boot_s, time=lambda: clocks.wall_s)
    monkeypatch.setattr(clock, "time", fake)
    return clocks


@pytest.mark.parametrize(
    ("since_boot_s", "wall_s", "passed_s"),
    [
        (7.0, 7.0, 7.0),
        (86_400.0, 86_400.0, 86_400.0),  # the host slept, and its monotonic clock stood still
        (7.0, 86_400.0, 86_400.0),  # the virtual machine returned from a snapshot
        (7.0, -3_600.0, 7.0),  # somebody set the wall clock back
    ],
)
def test_all_time_counts_and_none_twice(
    host: types.SimpleNamespace, since_boot_s: float, wall_s: float, passed_s: float
) -> None:
    """Whichever clock shows that time has passed, it counts once; a wall clock that is set back takes none away."""
    seconds = SuspendCountingClock()
    before_s = seconds()
    host.since_boot_s += since_boot_s
    host.wall_s += wall_s
    assert seconds() - before_s == passed_s
    host.since_boot_s += 10
    host.wall_s += 10
    assert seconds() - before_s == passed_s + 10


def test_it_is_a_clock_of_this_host() -> None:
    """It never goes back."""
    times_s = [clock.suspend_counting_s() for _ in range(100)]
    assert times_s == sorted(times_s)
