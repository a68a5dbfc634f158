"""An event loop with virtual time: when nothing is ready, its clock jumps to the next timer.

`virtual_time` also replaces the clocks, the random ids and the random numbers that the services use. So a run depends
on its seed alone, and a simulated hour takes as long as its events.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
import selectors
import sys
import time
import types
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple, Unpack

import pytest

from services.ingest.worker import streaming
from shared.domain import ids as domain_ids

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")

PARSE_S = 0.02
"""The duration of work in a thread."""


class Deadlock(BaseException):  # no retry may catch it
    """Nothing is ready, and no timer is set."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps. Work for threads runs in the loop, when its input is complete."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.suspended_s: Callable[[str], float] = lambda _: 0.0
        """Returns for how long the host of a process, given by its name, was suspended."""
        self._parsers: dict[asyncio.Future[Any], Callable[[], None]] = {}
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now_s

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[_Arguments]], object],
        *args: *_Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[_Arguments]], _Result], *args: *_Arguments
    ) -> asyncio.Future[_Result]:
        """Run the work of `asyncio.to_thread` soon, and a parser of an executor when its file is complete."""
        future: asyncio.Future[_Result] = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001  # the waiting task gets it
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        if executor is None:
            self.call_later(PARSE_S, run)
        else:
            self._parsers[future] = run
        return future

    def parse(self, future: asyncio.Future[Any]) -> None:
        """Let a parser run, because its file is complete."""
        self.call_later(PARSE_S, self._parsers.pop(future))


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock
        self._loop.now_s += max(0.0, timeout)
        return []


class _WholeFile(streaming._ChunkQueue):
    """A queue whose parser runs after the file has arrived."""

    def watch(self, parsing: asyncio.Future[Any]) -> None:
        super().watch(parsing)
        self._future = parsing

    def end(self) -> None:
        super().end()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.parse(self._future)


class _Clocks(types.ModuleType):
    """The module ``time`` for the services. While a host is suspended, only its monotonic clock stands still."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__("time")
        self.monotonic = lambda: loop.time() - loop.suspended_s(PROCESS.get())
        self.perf_counter = self.time = loop.time
        self.clock_gettime = lambda _: loop.time()


def run_virtually(work: Callable[[VirtualLoop], Coroutine[Any, Any, _Result]], *, seed: int) -> _Result:
    """Run a coroutine in virtual time. Equal seeds give equal runs."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        with _replaced(loop, seed):
            return runner.run(work(loop))


@contextlib.contextmanager
def _replaced(loop: VirtualLoop, seed: int) -> Iterator[None]:
    ids = random.Random(seed)
    state = random.getstate()
    random.seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=ids.getrandbits(128), version=4))
        patch.setattr(domain_ids, "os", types.SimpleNamespace(urandom=ids.randbytes))
        patch.setattr(streaming, "_ChunkQueue", _WholeFile)
        clocks = _Clocks(loop)
        for name, module in list(sys.modules.items()):
            if name.startswith(("services.", "shared.")) and getattr(module, "time", None) is time:
                patch.setattr(module, "time", clocks)
        try:
            yield
        finally:
            random.setstate(state)


def task_factory(tasks_of: Mapping[str, dict[asyncio.Task[Any], None]]) -> Callable[..., asyncio.Task[Any]]:
    """Return a task factory that notes each task under the process that creates it."""

    def create(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        tasks = tasks_of.get(PROCESS.get())
        if tasks is not None:
            tasks[task] = None
            task.add_done_callback(lambda done: tasks.pop(done, None))
        return task

    return create


PROCESS: contextvars.ContextVar[str] = contextvars.ContextVar("process", default="")
"""The name of the process that the present task belongs to."""
