"""Sets aside the keys whose records cannot be handled, so that the other records of their partition go on.

The key is what a handler works on: a country-day, a city-day or a request. A handler says for each key of a batch
whether it was handled, and why not. `FailedKeys` decides what happens then:

| error | what happens |
|---|---|
| an unreadable object of this date or request (`CorruptObject.harms_alone`) | the key is set aside at once |
| another error that follows from the record, as a `TypeError` | the key is tried again, up to SAME_FAULTS_MAX times |
| any other error: an outage, a later schema version | it is tried again without end |

The records of a key that is set aside go to the dead letters. Later records of the key are handled once. If they fail
in the same way, they follow without a wait; if not, the key is no longer set aside. Health and a metric show the key
until then, or until its object can be read again.

If no key was handled since the start, or since the last one was set aside, the handler itself may be at fault. Then
only one more key is set aside, and the others are tried again after the usual waits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec
import structlog

from shared.domain import objects
from shared.domain.errors import OperatorError
from shared.domain.objects import CorruptObject
from shared.domain.topics import Topic
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord
from shared.runtime import metrics
from shared.runtime.concurrency import bounded_map
from shared.runtime.health import Health
from shared.storage.object_store import ObjectStore

SAME_FAULTS_MAX: Final = 6
"""With the waits between the tries, a key is set aside after some ten seconds."""
REMEMBERED_MAX: Final = 1_000
SENT_AT_ONCE_MAX: Final = 50

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
_Item = TypeVar("_Item")
_log = structlog.get_logger()


class KeyResult(msgspec.Struct, frozen=True):
    """What a handler did with the records of one key: it handled them, or failed with an error of this key alone."""

    key: str
    records: Sequence[ConsumedRecord]
    error: Exception | None = None


Process = Callable[[Sequence[ConsumedRecord]], Awaitable[Sequence[KeyResult]]]
"""Handles a batch. It raises the errors that concern more than one key. A key without a result is handled."""


class RecordFault(RuntimeError):
    """Handling a record failed in a way that follows from the record. The message says how."""


def harms_one_key(error: Exception) -> bool:
    """Return whether an error follows from one record, or from a stored object of its date or its request alone."""
    if isinstance(error, CorruptObject):
        return error.harms_alone
    # Some errors of TLS are also a ValueError.
    return isinstance(error, (*_FAULTS_OF_RECORDS, RecordFault)) and not isinstance(error, OSError | OperatorError)


async def for_each(work: Callable[[_Item], Awaitable[None]], items: Iterable[_Item]) -> None:
    """Do ``work`` for one item after the other. An error that concerns one item alone is raised after the last item."""
    fault: Exception | None = None
    for item in items:
        try:
            await work(item)
        except Exception as error:
            if not harms_one_key(error):
                raise
            fault = error
    if fault is not None:
        raise fault


class FailedKeys:
    """The keys of one subscription that are set aside, and those that fail and are tried again."""

    def __init__(self, topic: Topic, publisher: Publisher, health: Health, store: ObjectStore) -> None:
        self._topic = topic
        self._publisher = publisher
        self._health = health
        self._store = store
        self._tries: dict[str, tuple[str, int]] = {}
        self._set_aside: dict[str, Exception] = {}
        self._handled_since = False
        self._export()

    async def handle(self, process: Process, left: list[ConsumedRecord]) -> None:
        """Handle the records that are ``left`` of a batch, and remove those that are handled or set aside.

        Raises what ``process`` raises, and the error of a key that is to be tried again.
        """
        failed: list[tuple[KeyResult, Exception]] = []
        for one in await process(tuple(left)):
            if one.error is not None:
                failed.append((one, one.error))
            else:
                self._handled_since = True
                self._forget(one.key)
        known = [(one, error) for one, error in failed if self._is_known(one.key, error)]
        again = [pair for pair in failed if pair not in known]
        proven = [(one, error) for one, error in again if self._count(one.key, error)]
        if proven and not self._handled_since:
            proven = proven[:1]
            self._tries.clear()
        for one, error in (*known, *proven):
            await self._give_up(one, error)
        if proven:
            self._handled_since = False
        again = [pair for pair in again if pair not in proven]
        left[:] = [record for one, _ in again for record in one.records]
        if again:
            raise again[0][1]

    def _is_known(self, key: str, error: Exception) -> bool:
        """Return whether trying a key again is known to be in vain."""
        return isinstance(error, CorruptObject) or type(self._set_aside.get(key)) is type(error)

    def _count(self, key: str, error: Exception) -> bool:
        """Return whether a key has failed so often in the same way that it is to be set aside."""
        before, tries = self._tries.pop(key, ("", 0))
        tries = tries + 1 if before == _text(error) else 1
        self._tries[key] = (_text(error), tries)
        return tries >= SAME_FAULTS_MAX

    async def _give_up(self, failed: KeyResult, error: Exception) -> None:
        """Send the records of a key to the dead letters, and set the key aside."""
        why = _text(error)
        if not isinstance(error, CorruptObject):
            why = f"handling it failed {SAME_FAULTS_MAX} times in the same way: {why}"
        await bounded_map(
            lambda record: self._publisher.send_to_dead_letters(record, why), failed.records, limit=SENT_AT_ONCE_MAX
        )
        if failed.key not in self._set_aside:
            _log.error("key_set_aside", topic=self._topic.value, key=failed.key, error=_text(error))
        self._tries.pop(failed.key, None)
        self._set_aside[failed.key] = error
        reason = f"its records go to the dead letters: {_text(error)}"
        self._health.failing("key", reason, detail=self._detail(failed.key), still_ready=True)
        if len(self._set_aside) > REMEMBERED_MAX:
            self._forget(next(iter(self._set_aside)))
        self._export()

    async def look_again(self) -> None:
        """Read one unreadable object again. If it can be read now, or is gone, its key is no longer set aside."""
        unreadable = [key for key, error in self._set_aside.items() if isinstance(error, CorruptObject)]
        if not unreadable:
            return
        key, error = unreadable[0], self._set_aside.pop(unreadable[0])
        self._set_aside[key] = error  # another one comes next
        assert isinstance(error, CorruptObject)
        found = await self._store.get(error.key)
        try:
            if found is not None:
                objects.decode(error.kind, found.body, error.key)
        except CorruptObject:
            return
        self._forget(key)

    def _forget(self, key: str) -> None:
        self._tries.pop(key, None)
        if self._set_aside.pop(key, None) is not None:
            self._health.recovered("key", detail=self._detail(key))
            self._export()

    def _export(self) -> None:
        metrics.failed_keys.labels(self._topic.value).set(len(self._set_aside))

    def _detail(self, key: str) -> str:
        return f"{key} of {self._topic.value}"


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, CorruptObject | RecordFault) else f"{type(error).__name__}: {error}"
