"""Retries with backoff while S3, Kafka or the network is unavailable: without limit, and visible in the health.

A retry library such as tenacity would replace only the loop. The health, the log and the prompt stop would stay.
"""

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
    """A service that Tripfold depends on is unavailable. The message being handled is never the cause."""


class Stopping(RuntimeError):
    """The process was asked to stop during a retry. Kafka will redeliver the unfinished batch."""


class Retrier:
    """Retries work with backoff until it succeeds or the process is asked to stop."""

    def __init__(self, *, health: Health, wait_max_s: float) -> None:
        self.health = health
        self.stopping = asyncio.Event()
        self._wait_max_s = wait_max_s

    async def retry_until_available(
        self, what: Concern, attempt: Callable[[], Awaitable[_Result]], *, detail: str = ""
    ) -> _Result:
        """Run ``attempt`` until it succeeds, and return its result.

        ``what`` and ``detail`` name it in logs and health; metrics have only ``what``.

        Every exception is retried, including a bug of Tripfold: the message being handled is kept, and the process
        reports that it is not ready. Raises Stopping when the process is asked to stop.
        """
        tries = 0
        while True:
            if self.stopping.is_set():
                raise Stopping(f"{what} {detail}".rstrip())
            try:
                result = await attempt()
            except Stopping:
                raise
            except Exception as error:  # noqa: BLE001  # see the docstring
                tries += 1
                expected = isinstance(error, OperatorError)  # its message needs no name of a class
                self.health.failing(what, str(error) if expected else f"{type(error).__name__}: {error}", detail=detail)
                _log.warning("retrying", what=what, detail=detail, tries=tries, error=str(error), exc_info=not expected)
                await self.pause(min(self._wait_max_s, WAIT_FIRST_S * 2 ** min(tries, 20)))
            else:
                self.health.recovered(what, detail=detail)
                return result

    def now_s(self) -> float:
        """Return the time of the monotonic clock that the waits use, in seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds``; return at once when asked to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            return

    async def pause(self, seconds: float) -> None:
        """Sleep for half to all of ``seconds``, at random; return at once when asked to stop."""
        await self.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311  # jitter, not a secret

    def raise_if_stopping(self) -> None:
        """Raise Stopping if the process was asked to stop."""
        if self.stopping.is_set():
            raise Stopping


async def run_all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines concurrently until all have ended, then raise the first error, if any."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
