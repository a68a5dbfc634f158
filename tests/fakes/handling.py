"""Handles a batch as the service does that has no key to set aside."""

from __future__ import annotations

from collections.abc import Sequence

from shared.kafka.failed_keys import Process
from shared.kafka.records import ConsumedRecord


async def handle_all(process: Process, batch: Sequence[ConsumedRecord]) -> None:
    """Handle a batch. Raises the error of the first key that was not handled."""
    for one in await process(batch):
        if one.error is not None:
            raise one.error
