"""Request deadlines: the API fails fast where the event consumers retry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from shared.runtime.retry import DependencyUnavailable


class DeadlineExceeded(DependencyUnavailable):
    """S3 or Kafka did not respond before the deadline. The operation may have happened nevertheless."""


@contextlib.asynccontextmanager
async def deadline(
    limit_s: float, operation: str, error_type: type[DependencyUnavailable] = DeadlineExceeded
) -> AsyncIterator[None]:
    """Raise ``error_type`` if the body of the ``async with`` takes longer than ``limit_s``.

    ``operation`` describes the body in the message.
    """
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as error:
        raise error_type(f"{operation} took longer than {limit_s:g} s") from error
