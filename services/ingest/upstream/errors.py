"""What can go wrong with the upstream: three kinds, each with its own consequence."""

from __future__ import annotations


class UpstreamDown(RuntimeError):
    """The upstream cannot be reached at all: waited out, up to a limit, at the cost of no attempt."""


class TransientUpstreamError(RuntimeError):
    """The upstream answered with a fault that may pass (a cut body, a stall, 5xx, 429): one attempt has failed."""

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class PermanentUpstreamError(RuntimeError):
    """The city-day (or the list of cities) cannot be had; the message is the reason that the user is told."""
