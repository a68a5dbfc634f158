"""Waiting out the faults of the surroundings: S3, Kafka, the network. Without bound, with backoff, visibly."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import structlog

from shared.domain.errors import OperatorError
from shared.runtime.health import Health
from shared.runtime.metrics import Concern

WAIT_FIRST_S = 0.2

_Result = TypeVar("_Result")
_log = structlog.get_logger()


class DependencyUnavailable(OperatorError):
    """Something that Tripfold needs cannot be used now. It is never the fault of the message being handled."""


class Stopping(RuntimeError):
    """The process was asked to stop while it waited. What was under way is given back, not lost."""


class Retrier:
    """How long to wait between two tries, and what ends the waiting: the process being asked to stop."""

    def __init__(self, *, health: Health, wait_max_s: float) -> None:
        self.health = health
        self.stopping = asyncio.Event()
        self._wait_max_s = wait_max_s

    async def retry_until_available(
        self, what: Concern, attempt: Callable[[], Awaitable[_Result]], *, detail: str = ""
    ) -> _Result:
        """Run ``attempt`` until it ends without a fault, and return its result.

        ``what`` and ``detail`` name it in logs and health; metrics have ``what`` alone.

        Any exception counts as a fault of the surroundings, an error of our own included: the message that is being
        handled is kept, the process shows itself not ready, and nothing is lost. Raises Stopping when asked to stop.
        """
        tries = 0
        while True:
            if self.stopping.is_set():
                raise Stopping(f"{what} {detail}".rstrip())
            try:
                result = await attempt()
            except Stopping:
                raise
            except Exception as error:  # noqa: BLE001  # see the docstring: whatever it is, the message is kept
                tries += 1
                self.health.failing(what, f"{type(error).__name__}: {error}", detail=detail)
                expected = isinstance(error, OperatorError)
                _log.warning("waiting", what=what, detail=detail, tries=tries, error=str(error), exc_info=not expected)
                await self.pause(min(self._wait_max_s, WAIT_FIRST_S * 2 ** min(tries, 20)))
            else:
                self.health.recovered(what, detail=detail)
                return result

    def now_s(self) -> float:
        """Return the time by the clock that the waiting goes by: seconds from any origin, never backwards."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds``; end at once when asked to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            return

    async def pause(self, seconds: float) -> None:
        """Sleep up to ``seconds``, with jitter; end at once when asked to stop."""
        await self.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311  # jitter, not a secret

    def raise_if_stopping(self) -> None:
        """Raise Stopping if the process was asked to stop."""
        if self.stopping.is_set():
            raise Stopping


async def run_all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines side by side until all have ended; then raise the first error, as it is, if there was one."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
