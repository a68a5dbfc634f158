"""Giving up early. Elsewhere faults of the surroundings are waited out; here somebody is waiting for the answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from shared.runtime.retry import DependencyUnavailable


class TookTooLong(DependencyUnavailable):
    """S3 or Kafka did not answer in the time that a client can be made to wait. What was asked may have happened."""


@contextlib.asynccontextmanager
async def deadline(limit_s: float, what: str, fault: type[DependencyUnavailable] = TookTooLong) -> AsyncIterator[None]:
    """Raise ``fault`` if the body of the ``async with`` takes longer than ``limit_s``; ``what`` says what it does."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as error:
        raise fault(f"{what} took longer than {limit_s:g} s") from error
