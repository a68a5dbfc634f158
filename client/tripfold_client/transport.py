"""Sends HTTP requests with httpx, for asyncio or blocking.

All logic of the client is written once, as coroutines over the Transport port. The coroutines of BlockingTransport
never suspend, so ``run`` can finish such a coroutine without an event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from typing import Protocol, TypeVar

import httpx
from httpx_sse import EventSource, ServerSentEvent

_T = TypeVar("_T")

EVENT_STREAM = "text/event-stream"


class NoEventStream(Exception):
    """The response is no stream of events. Its body has been read."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(str(response.status_code))
        self.response = response


class Transport(Protocol):
    """Sends requests and sleeps."""

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send a request; return the response with its body. Raises httpx.TransportError."""
        ...

    def events(self, request: httpx.Request) -> AsyncGenerator[ServerSentEvent]:
        """Yield the events of a stream. Raises NoEventStream and httpx.TransportError."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class AsyncTransport:
    """Sends requests on the running event loop."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def send(self, request: httpx.Request) -> httpx.Response:
        return await self._client.send(request)

    async def events(self, request: httpx.Request) -> AsyncGenerator[ServerSentEvent]:
        response = await self._client.send(request, stream=True)
        try:
            if not _is_event_stream(response):
                await response.aread()
                raise NoEventStream(response)
            async for event in EventSource(response).aiter_sse():
                yield event
        finally:
            await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._client.aclose()


class BlockingTransport:
    """Sends requests on the calling thread. Its coroutines never suspend."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    async def send(self, request: httpx.Request) -> httpx.Response:
        return self._client.send(request)

    async def events(self, request: httpx.Request) -> AsyncGenerator[ServerSentEvent]:
        response = self._client.send(request, stream=True)
        try:
            if not _is_event_stream(response):
                response.read()
                raise NoEventStream(response)
            for event in EventSource(response).iter_sse():
                yield event
        finally:
            response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # no event loop runs this

    async def close(self) -> None:
        self._client.close()


def run(work: Awaitable[_T]) -> _T:
    """Return the result of a coroutine over a BlockingTransport."""
    try:
        work.__await__().send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    raise RuntimeError("a blocking call has suspended")


def iterate(work: AsyncGenerator[_T]) -> Iterator[_T]:
    """Yield what an asynchronous generator over a BlockingTransport yields."""
    try:
        while True:
            try:
                item = run(anext(work))
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(work.aclose())


def _is_event_stream(response: httpx.Response) -> bool:
    return response.status_code == httpx.codes.OK and response.headers.get("content-type", "").startswith(EVENT_STREAM)
