"""The errors of the upstream: three kinds, each handled in its own way."""

from __future__ import annotations


class UpstreamDown(RuntimeError):
    """The upstream cannot be reached. It is retried with backoff up to a limit, and the outage costs no attempt."""


class OutageTooLong(UpstreamDown):
    """The outage of the upstream has lasted longer than the limit."""


class UpstreamHeld(UpstreamDown):
    """The upstream asked to wait (``Retry-After``), for ``wait_s`` more seconds. No request was made."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"the upstream asked to wait for {wait_s:.0f} s more")
        self.wait_s = wait_s


class TransientUpstreamError(RuntimeError):
    """The upstream failed in a way that may pass, such as a cut body, a stall, 5xx or 429. One attempt has failed."""

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class PermanentUpstreamError(RuntimeError):
    """The city-day or the city list cannot be fetched. The message is the reason that the user sees."""
