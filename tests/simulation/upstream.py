"""The upstream in virtual time. It keeps every version of its list and files, with the time since when it serves it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING

import msgspec

from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from services.ingest.upstream.port import Download, Validators
from shared.domain.contribution import Contribution
from tests.fakes.builders import City, Trip, trip_file

if TYPE_CHECKING:
    from tests.simulation.processes import Process

CHUNK_BYTES = 100
TRICKLE_INTERVAL_S = 25.0
"""How often a download without end sends something: before the read timeout of the real client."""
IDLE_MAX_S = 15.0
"""The upstream closes a connection that nobody reads for so long."""
IDS_IN_TEXT = 0.1
"""The share of ids that the list has as strings."""
File = tuple[Trip, ...] | bytes | None
"""A file: its trips, or the bytes of an invalid one, or None for a missing one."""


class Version(msgspec.Struct, frozen=True):
    """A state of a file or list, and the time since when the upstream serves it."""

    since_s: float
    value: object


class UpstreamHistory:
    """All versions of the list of cities and of each file, the latest last, and the present faults."""

    def __init__(self) -> None:
        self.lists: list[Version] = [Version(0, {})]
        self.files: dict[tuple[int, dt.date], list[Version]] = {}
        self.down_until_s = 0.0
        self.failing_until_s = 0.0
        self.trickling_until_s = 0.0

    def list_cities(self, cities: dict[int, str] | None, now_s: float) -> None:
        """Serve another list from now on: the country of each city, or None if it cannot be read."""
        self.lists.append(Version(now_s, cities))

    def put_file(self, city: int, date: dt.date, file: File, now_s: float) -> None:
        """Serve another file from now on."""
        self.files.setdefault((city, date), []).append(Version(now_s, file))

    def file(self, city: int, date: dt.date) -> File:
        """Return the present file."""
        versions = self.files.get((city, date))
        return versions[-1].value if versions else None  # type: ignore[return-value]  # files only have files

    @property
    def cities(self) -> dict[int, str] | None:
        """The present list."""
        return self.lists[-1].value  # type: ignore[return-value]  # lists only have lists

    def contributions_since(self, city: int, date: dt.date, since_s: float) -> list[Contribution]:
        """Return the contributions of all good files that were served at ``since_s`` or later."""
        return [
            contribution_of(one.value)
            for one in _since(self.files.get((city, date), []), since_s)
            if isinstance(one.value, tuple)
        ]

    def countries_since(self, city: int, since_s: float) -> set[str]:
        """Return the countries in which the list had a city at ``since_s`` or later."""
        return {
            one.value[city].lower()
            for one in _since(self.lists, since_s)
            if isinstance(one.value, dict) and city in one.value
        }


def _since(versions: list[Version], since_s: float) -> list[Version]:
    first = max((at for at, one in enumerate(versions) if one.since_s <= since_s), default=0)
    return versions[first:]


def contribution_of(trips: tuple[Trip, ...]) -> Contribution:
    """Add up a file."""
    return Contribution(
        trips=len(trips),
        passengers=sum(trip.passengers for trip in trips),
        accidents=sum(trip.accident for trip in trips),
        delay_total_ms=sum(trip.delay_ms for trip in trips),
    )


class SimulatedUpstream:
    """The upstream as one process uses it."""

    def __init__(self, process: Process, circuit: CircuitBreaker) -> None:
        self._process = process
        self._circuit = circuit
        self._simulation = process.simulation
        self._upstream = process.simulation.upstream

    async def cities(self) -> bytes:
        await self._head("the list of cities")
        cities = self._upstream.cities
        if cities is None:
            raise PermanentUpstreamError("http://upstream.test/cities answered 403")
        await asyncio.sleep(self._simulation.latency_s(0.01, 0.5))
        await self._process.go_on()
        return json.dumps([self._entry(City(city, country)) for city, country in cities.items()]).encode()

    def _entry(self, city: City) -> dict[str, object]:
        """Return an entry of the list, with the id as a number or, at times, as a string."""
        in_text = self._simulation.random.random() < IDS_IN_TEXT
        return msgspec.structs.asdict(city) | ({"id": str(city.id)} if in_text else {})

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        return f"http://upstream.test/cities/{upstream_id}/stats?date={date}"

    @contextlib.asynccontextmanager
    async def download(self, upstream_id: str, date: dt.date, known: Validators | None) -> AsyncIterator[Download]:
        url = self.city_url(upstream_id, date)
        await self._head(url)
        file = self._upstream.file(int(upstream_id), date)
        await asyncio.sleep(self._simulation.latency_s(0.01, 0.5))
        await self._process.go_on()
        if file is None:
            raise PermanentUpstreamError(f"{url} answered 404")
        body = file if isinstance(file, bytes) else trip_file(file, date)
        etag = f'"{hashlib.sha256(body).hexdigest()}"' if int(upstream_id) % 4 else None  # every fourth sends none
        if etag is not None and known is not None and known.etag == etag:
            yield Download(url=url, chunks=None)
            return
        chunks = self._chunks(url, body, self._simulation.loop.now_s)
        async with contextlib.aclosing(chunks):
            yield Download(url=url, chunks=chunks, validators=Validators(etag=etag), bytes_total=len(body))

    async def _head(self, what: str) -> None:
        await self._process.go_on()
        simulation, upstream = self._simulation, self._upstream
        simulation.calls += 1
        await asyncio.sleep(simulation.latency_s(0.01, 0.5))
        await self._process.go_on()
        if simulation.loop.now_s < upstream.down_until_s:
            raise UpstreamDown(f"{what}: connection refused")
        self._circuit.reached()
        if simulation.loop.now_s < upstream.failing_until_s:
            raise TransientUpstreamError(f"{what} answered 500")

    async def _chunks(self, url: str, body: bytes, sent_s: float) -> AsyncGenerator[bytes]:
        simulation = self._simulation
        if simulation.loop.now_s - sent_s > IDLE_MAX_S:
            simulation.faults["idle connection closed"] += 1
            raise TransientUpstreamError(f"{url} broke off after 0 bytes")
        trickles = simulation.loop.now_s < self._upstream.trickling_until_s
        while trickles:
            await asyncio.sleep(TRICKLE_INTERVAL_S)
            await self._process.go_on()
            yield b" "
        for begin in range(0, len(body), CHUNK_BYTES):
            await asyncio.sleep(simulation.latency_s(0.001, 0.1))
            await self._process.go_on()
            if simulation.is_unlucky("download broken off"):
                raise TransientUpstreamError(f"{url} broke off after {begin} bytes")
            yield body[begin : begin + CHUNK_BYTES]
