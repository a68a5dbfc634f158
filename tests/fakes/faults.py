"""Breaks calls across the ports of a process: a schedule says which call fails and how."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec

_Result = TypeVar("_Result")


class Crash(BaseException):  # no retry may catch it
    """The process crashed at this call."""


class Break(enum.Enum):
    """A way in which a call across a port breaks."""

    DIE_BEFORE = "the process crashes before the call happens"
    DIE_AFTER = "the call happens, and the process crashes before it gets the response"
    LOST_ANSWER = "the call happens, its response is lost, and the process sees a fault"
    REFUSED = "the call does not happen, and the process sees a fault"
    SENT_TWICE = "the call happens, its response is lost, and the client sends it again by itself"
    UNDECIDED = "the call does not happen, and a compare-and-swap conflicts, as when a conflict never ends"
    PAUSE = "the process pauses before the call happens, until the others replace it"


class PortCall(msgspec.Struct, frozen=True):
    """A call across a port: its process, its name, and whether it has an effect outside the process."""

    life: str
    what: str
    effect: bool


class PortCalls:
    """Counts all calls across ports, and breaks those that the schedule names by number."""

    def __init__(self, schedule: Mapping[int, Break] | None = None) -> None:
        self.made: list[PortCall] = []
        self._schedule = dict(schedule or {})

    def heal(self) -> None:
        """Break nothing from here on."""
        self._schedule = {}

    def break_after(self, calls: int, how: Break) -> None:
        """Break one call, after ``calls`` more calls."""
        self._schedule[len(self.made) + calls] = how

    def next_break(self, port_call: PortCall) -> Break | None:
        """Count a call, and return how it breaks."""
        self.made.append(port_call)
        return self._schedule.get(len(self.made) - 1)


class ProcessLife:
    """One run of a process. After a crash no task of it makes another call.

    ``calls_left`` is the number of calls before the process pauses; None: it does not pause.
    """

    def __init__(self, name: str, port_calls: PortCalls) -> None:
        self.name = name
        self.port_calls = port_calls
        self.dead = False
        self.paused = asyncio.Event()
        self.resumed = asyncio.Event()
        self.calls_left: int | None = None

    async def make_call(
        self,
        what: str,
        call: Callable[[], Awaitable[_Result]],
        fault: Callable[[str], Exception],
        *,
        effect: bool,
        refusal: Callable[[str], Exception] | None = None,
        loss: Callable[[str], Exception] | None = None,
    ) -> _Result:
        """Make a call across a port, or break it as scheduled.

        A broken call raises ``fault``, or ``refusal`` if it never happened. A call that can conflict raises ``loss``
        then.
        """
        await self._go_on()
        broken = self.port_calls.next_break(PortCall(self.name, what, effect))
        match broken:
            case Break.DIE_BEFORE:
                self.dead = True
                raise Crash(what)
            case Break.REFUSED:
                raise (refusal or fault)(f"{what} was refused")
            case Break.UNDECIDED if loss is not None:
                raise loss(what)
            case Break.PAUSE:
                self.pause()
                await self.resumed.wait()
        result = await call()
        if broken is Break.SENT_TWICE and effect:
            result = await call()
        if broken is Break.DIE_AFTER:
            self.dead = True
            raise Crash(what)
        if broken is Break.LOST_ANSWER:
            raise fault(f"the answer to {what} was lost")
        return result

    async def _go_on(self) -> None:
        if self.calls_left == 0:
            self.pause()
        if self.paused.is_set():
            await self.resumed.wait()
        if self.dead:
            raise Crash(f"{self.name} is dead")
        if self.calls_left is not None:
            self.calls_left -= 1

    def pause(self) -> None:
        """Make no call until resumed."""
        self.calls_left = None
        self.resumed.clear()
        self.paused.set()


async def do_nothing() -> None:
    return
