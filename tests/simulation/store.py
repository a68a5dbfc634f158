"""A bucket in virtual time: latency, outages, lost responses, and writes that happen after their client gave up."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from shared.domain import keys
from shared.storage.conditional_writes import NEVER_AN_ETAG
from shared.storage.object_store import (
    CasConflict,
    ObjectInfo,
    StoredObject,
    StoreUnavailable,
    UnfinishedUpload,
    Upload,
)
from tests.fakes.store import MemoryStore

if TYPE_CHECKING:
    from tests.simulation.processes import Process
    from tests.simulation.simulation import Simulation

TIMEOUT_S = 30.0

_Result = TypeVar("_Result")


class SimulatedStore:
    """The bucket as one process uses it: the methods of `shared.storage.s3.S3Store` that the services need."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._simulation: Simulation = process.simulation
        self._bucket: MemoryStore = process.simulation.bucket

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    async def check_next(self) -> bool:
        with contextlib.suppress(CasConflict):
            await self.compare_and_swap(keys.WRITE_CHECK, b"{}", etag=NEVER_AN_ETAG)
        return True

    async def now(self) -> dt.datetime:
        return self._simulation.clock()

    async def _read(self, what: str, call: Callable[[], Awaitable[_Result]]) -> _Result:
        await self._begin(what)
        await self._wait(what)
        result = await call()
        await self._end(what)
        return result

    async def _wait(self, what: str) -> None:
        """Wait for the bucket to respond, but no longer than the client's timeout."""
        seconds = self._simulation.store_wait_s()
        await asyncio.sleep(min(seconds, TIMEOUT_S))
        await self._process.go_on()
        if seconds > TIMEOUT_S:
            raise StoreUnavailable(f"{what}: no response")

    async def _write(self, what: str, call: Callable[[], Awaitable[_Result]], *, conditional: bool = False) -> _Result:
        """Make a write. It happens even if the process dies meanwhile, and perhaps after the process gave up."""
        await self._begin(what)
        simulation = self._simulation
        if conditional and simulation.is_unlucky("conflict not decided"):
            raise CasConflict(what)
        late = simulation.is_unlucky("write later than its timeout")
        sent_s = TIMEOUT_S * simulation.random.uniform(1, 3) if late else simulation.latency_s(0.001, 0.02)
        sent_s += simulation.store_wait_s()
        happening = asyncio.Task(self._after(sent_s, call), loop=simulation.loop)  # not a task of the process
        happening.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                result = await asyncio.shield(happening)
        except TimeoutError as error:
            raise StoreUnavailable(f"{what}: no response") from error
        await self._end(what)
        return result

    async def _after(self, seconds: float, call: Callable[[], Awaitable[_Result]]) -> _Result:
        await asyncio.sleep(seconds)
        return await call()

    async def _begin(self, what: str) -> None:
        await self._process.go_on()
        simulation = self._simulation
        simulation.calls += 1
        await asyncio.sleep(simulation.latency_s(0.001, 0.02))
        await self._process.go_on()
        if simulation.loop.now_s < simulation.store_down_until_s:
            simulation.count_refusal(self._process)
            raise StoreUnavailable(f"{what} was refused")
        if simulation.is_unlucky("S3 refused"):
            raise StoreUnavailable(f"{what} was refused")

    async def _end(self, what: str) -> None:
        await asyncio.sleep(self._simulation.latency_s(0.001, 0.02))
        await self._process.go_on()
        if self._simulation.is_unlucky("S3 response lost"):
            raise StoreUnavailable(f"the response to {what} was lost")

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        return await self._read(f"get {key}", lambda: self._bucket.get(key, first_bytes=first_bytes))

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        return await self._write(
            f"swap {key}", lambda: self._bucket.compare_and_swap(key, body, etag=etag), conditional=True
        )

    async def put(self, key: str, body: bytes) -> None:
        await self._write(f"put {key}", lambda: self._bucket.put(key, body))

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        await self._begin(f"list {prefix}")
        await self._wait(f"list {prefix}")
        listed = [one async for one in self._bucket.list(prefix, after=after)]
        await self._end(f"list {prefix}")
        for one in listed:
            yield one

    def upload(self, key: str) -> Upload:
        return _Upload(self, self._bucket.upload(key), key)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        await self._begin(f"stream {key}")
        await self._wait(f"stream {key}")
        chunks = [chunk async for chunk in self._bucket.stream(key)]
        await self._end(f"stream {key}")
        yield b"".join(chunks)

    async def delete(self, key: str) -> None:
        await self._write(f"delete {key}", lambda: self._bucket.delete(key))

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        await self._begin(f"list uploads {prefix}")
        async for unfinished in self._bucket.unfinished_uploads(prefix):
            yield unfinished

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        await self._write(f"abort {unfinished.key}", lambda: self._bucket.abort_upload(unfinished))


class _Upload:
    def __init__(self, store: SimulatedStore, upload: Upload, key: str) -> None:
        self._store = store
        self._upload = upload
        self._key = key

    async def write(self, chunk: bytes) -> None:
        await asyncio.sleep(self._store._simulation.store_wait_s())
        await self._store._process.go_on()
        await self._upload.write(chunk)

    async def complete(self) -> None:
        await self._store._write(f"complete {self._key}", self._upload.complete)

    async def abort(self) -> None:
        if not self._store._process.dead:
            await self._upload.abort()


def _retrieve(happening: asyncio.Task[object]) -> None:
    if not happening.cancelled():
        happening.exception()
