"""The port through which the ingest uses the upstream. `services.ingest.upstream.client` adapts it to HTTP."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec


class Validators(msgspec.Struct, frozen=True, kw_only=True):
    """The ETag and Last-Modified of a stored file, as the upstream sent them, for a conditional GET."""

    etag: str | None = None
    last_modified: str | None = None


class Download(msgspec.Struct, kw_only=True):
    """A response whose body is being received. ``chunks`` is None for 304; sizes are without the content-encoding."""

    url: str
    chunks: AsyncIterator[bytes] | None
    validators: Validators = Validators()
    bytes_total: int | None = None


class Upstream(Protocol):
    """The upstream. Its methods raise UpstreamDown, TransientUpstreamError and PermanentUpstreamError."""

    async def cities(self) -> bytes:
        """Return the body of the city list."""

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        """Return the URL of a city-day's file."""

    def download(
        self, upstream_id: str, date: dt.date, known: Validators | None
    ) -> AbstractAsyncContextManager[Download]:
        """Fetch a city-day's file, unless the ``known`` validators say that it is unchanged."""
