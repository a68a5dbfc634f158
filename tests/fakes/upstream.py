"""The upstream in memory, and the same upstream with calls that can break."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
from collections.abc import AsyncIterator

from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from services.ingest.upstream.port import Download, Upstream, Validators
from tests.fakes.faults import ProcessLife, do_nothing


class MemoryUpstream:
    """An Upstream whose list and files are set by the test; a fault in place of bytes is raised by its download.

    ``cuts`` holds, for a city, after how many bytes each of its next downloads breaks off.
    """

    def __init__(self, *, chunk_bytes: int = 64 * 1024, etags: bool = True) -> None:
        self.city_list: bytes | Exception = b"[]"
        self.files: dict[str, bytes | Exception] = {}
        self.cuts: dict[str, list[int]] = {}
        self.downloads: list[str] = []
        self._chunk_bytes = chunk_bytes
        self._etags = etags

    async def cities(self) -> bytes:
        await asyncio.sleep(0)
        if isinstance(self.city_list, Exception):
            raise self.city_list
        return self.city_list

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        return f"http://upstream.test/cities/{upstream_id}/stats?date={date}"

    @contextlib.asynccontextmanager
    async def download(self, upstream_id: str, date: dt.date, known: Validators | None) -> AsyncIterator[Download]:
        await asyncio.sleep(0)
        url = self.city_url(upstream_id, date)
        file = self.files.get(upstream_id, PermanentUpstreamError(f"{url} answered 404"))
        if isinstance(file, Exception):
            raise file
        etag = f'"{hashlib.sha256(file).hexdigest()}"' if self._etags else None
        if etag is not None and known is not None and known.etag == etag:
            yield Download(url=url, chunks=None)
            return
        self.downloads.append(upstream_id)
        cuts = self.cuts.get(upstream_id)
        cut = cuts.pop(0) if cuts else None
        chunks = self._chunks(url, file, cut)
        yield Download(url=url, chunks=chunks, validators=Validators(etag=etag), bytes_total=len(file))

    async def _chunks(self, url: str, file: bytes, cut: int | None) -> AsyncIterator[bytes]:
        sent = file[:cut]
        for begin in range(0, len(sent), self._chunk_bytes):
            await asyncio.sleep(0)
            yield sent[begin : begin + self._chunk_bytes]
        if cut is not None:
            raise TransientUpstreamError(f"{url} broke off after {cut} bytes")


class BreakableUpstream:
    """An Upstream whose calls and chunks are calls of a `ProcessLife`."""

    def __init__(self, upstream: Upstream, life: ProcessLife) -> None:
        self._upstream = upstream
        self._life = life

    async def cities(self) -> bytes:
        return await self._life.make_call("GET /cities", self._upstream.cities, UpstreamDown, effect=False)

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        return self._upstream.city_url(upstream_id, date)

    @contextlib.asynccontextmanager
    async def download(self, upstream_id: str, date: dt.date, known: Validators | None) -> AsyncIterator[Download]:
        await self._life.make_call(f"GET file {upstream_id}", do_nothing, UpstreamDown, effect=False)
        async with self._upstream.download(upstream_id, date, known) as download:
            if download.chunks is not None:
                download.chunks = self._chunks(download.chunks, upstream_id)
            yield download

    async def _chunks(self, chunks: AsyncIterator[bytes], upstream_id: str) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            await self._life.make_call(f"read file {upstream_id}", do_nothing, TransientUpstreamError, effect=False)
            yield chunk
