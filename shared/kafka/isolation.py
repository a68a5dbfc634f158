"""Isolates a record whose handling fails again and again in the same way, so that its partition goes on.

A case: the handler of a batch raises a `TypeError` for one record, at each try. A restart does not help, and the
records behind it wait. So after SAME_FAULTS_MAX equal errors in a row the batch is halved, until the record that raises
this error is alone. It goes to the dead letters, with the error. An operator can send it back from there.

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
        self._size = len(self._left)
        self._process = process
        self._publisher = publisher
        self._fault = ""
        self._times = 0
        self._proven: set[str] = set()
        self._isolated = False

    async def handle(self) -> None:
        """Handle the records that are left. Isolate a record once its error was raised SAME_FAULTS_MAX times in a row.

        Raises what the handler raises.
        """
        while self._left:
            part = self._left[: self._size]
            try:
                await self._process(part)
            except Exception as error:
                self._count(error)
                if self._fault not in self._proven:
                    raise
                if len(part) > 1:
                    self._size = len(part) // 2
                    continue
                if self._isolated:  # and no record was handled since
                    self._proven.clear()
                    self._times = 0
                    self._isolated = False
                    raise
                await self._isolate(part[0])
            else:
                self._isolated = False
            self._left = self._left[len(part) :]
            self._size = len(self._left)

    def _count(self, error: Exception) -> None:
        fault = f"{type(error).__name__}: {error}" if _is_fault_of_records(error) else ""
        self._times = self._times + 1 if fault == self._fault else 1
        self._fault = fault
        if fault and self._times >= SAME_FAULTS_MAX:
            self._proven.add(fault)

    async def _isolate(self, record: ConsumedRecord) -> None:
        place = {"topic": record.topic.value, "partition": record.partition, "offset": record.offset}
        _log.error("record_isolated", **place, error=self._fault)
        await self._publisher.send_to_dead_letters(
            record, f"handling it failed {SAME_FAULTS_MAX} times in the same way: {self._fault}"
        )
        self._isolated = True


def _is_fault_of_records(error: Exception) -> bool:
    """Return whether an error can follow from a record, or from a stored object of its date or its request alone."""
    if isinstance(error, CorruptObject):
        return error.harms_alone
    # Some errors of TLS are also a ValueError.
    return isinstance(error, _FAULTS_OF_RECORDS) and not isinstance(error, OSError | OperatorError)
