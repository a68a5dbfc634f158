"""Isolates a record whose handling fails again and again in the same way, so that its partition goes on.

A case: the handler of a batch raises a `TypeError` for one record, at each try. A restart does not help, and the
records behind it wait. So after SAME_FAULTS_MAX equal errors the batch is handled half by half. The record that still
raises this error when it is alone goes to the dead letters, with the error. An operator can send it back from there.

An outage isolates nothing, however long it lasts. Only errors count that follow from the record or from a stored object
of its date or request (`_is_fault_of_records`). If each record of a batch fails alone, the handler itself is at fault.
Then only the first record is isolated, and the others are tried again after the usual waits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import structlog

from shared.domain.errors import OperatorError
from shared.domain.objects import CorruptObject
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord

SAME_FAULTS_MAX: Final = 6
"""With the waits between the tries, a record is isolated after some ten seconds."""

Process = Callable[[Sequence[ConsumedRecord]], Awaitable[None]]

_FAULTS_OF_RECORDS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    msgspec.MsgspecError,
)
_log = structlog.get_logger()


class IsolatingBatch:
    """A batch of records. `handle` it again after each error: the records that are handled do not come again."""

    def __init__(self, batch: Sequence[ConsumedRecord], process: Process, publisher: Publisher) -> None:
        self._left = list(batch)
        self._process = process
        self._publisher = publisher
        self._fault = ""
        self._times = 0
        self._isolated = 0
        self._worked = False

    async def handle(self) -> None:
        """Handle the records that are left. Isolate a record once its error was raised SAME_FAULTS_MAX times in a row.

        Raises what the handler raises.
        """
        if not self._left:
            return
        try:
            await self._process(self._left)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}" if _is_fault_of_records(error) else ""
            self._times = self._times + 1 if fault == self._fault else 1
            self._fault = fault
            if not fault or self._times < SAME_FAULTS_MAX:
                raise
        else:
            return
        self._times = self._isolated = 0
        self._worked = False
        await self._handle_apart(self._left)

    async def _handle_apart(self, records: list[ConsumedRecord]) -> None:
        """Handle the next records, half by half. Raises any other error; and this one, if it is that of each record."""
        try:
            await self._process(records)
        except Exception as error:
            if not _is_fault_of_records(error) or f"{type(error).__name__}: {error}" != self._fault:
                raise
            half = len(records) // 2
            if half:
                await self._handle_apart(records[:half])
                await self._handle_apart(records[half:])
                return
            if self._isolated and not self._worked:
                raise
            await self._isolate(records[0])
        else:
            self._worked = True
        self._left = self._left[len(records) :]

    async def _isolate(self, record: ConsumedRecord) -> None:
        place = {"topic": record.topic.value, "partition": record.partition, "offset": record.offset}
        _log.error("record_isolated", **place, error=self._fault)
        await self._publisher.send_to_dead_letters(
            record, f"handling it failed {SAME_FAULTS_MAX} times in the same way: {self._fault}"
        )
        self._isolated += 1


def _is_fault_of_records(error: Exception) -> bool:
    """Return whether an error can follow from a record, or from a stored object of its date or its request alone."""
    if isinstance(error, CorruptObject):
        return error.harms_alone
    # Some errors of TLS are also a ValueError.
    return isinstance(error, _FAULTS_OF_RECORDS) and not isinstance(error, OSError | OperatorError)
