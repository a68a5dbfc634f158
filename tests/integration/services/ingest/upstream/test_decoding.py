"""Content-codings: every form of them is decoded, in bounded memory."""

from __future__ import annotations

import gzip
import zlib

import brotli
import pytest

from services.ingest.upstream import client as upstream_client
from services.ingest.upstream.errors import PermanentUpstreamError
from shared.runtime import zstd
from tests.integration.services.ingest.upstream.client import (
    BODY,
    BOMB,
    LARGE,
    client_of,
)
from tests.integration.services.ingest.upstream.hostile import (
    HostileServer,
    whole,
)

CODINGS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": lambda body: brotli.compress(body, quality=1),
    "zstd": zstd.compress,
}


@pytest.mark.parametrize("coding", CODINGS.keys())
async def test_a_compression_bomb_is_stopped_early(coding: str) -> None:
    """A body that inflates beyond the ratio fails its city after little of it was inflated."""
    async with (
        HostileServer(whole(CODINGS[coding](BOMB), content_encoding=coding)) as server,
        client_of(server.url) as client,
    ):
        taken: list[int] = []
        with pytest.raises(PermanentUpstreamError, match="TRIPFOLD_UPSTREAM_DECOMPRESSION_RATIO_MAX"):
            await client.drain(taken)
        assert max(taken) <= 8 * 1024**2
        assert sum(taken) <= upstream_client.RATIO_FREE_BYTES + 8 * 1024**2


@pytest.mark.parametrize("coding", CODINGS.keys())
async def test_every_requested_coding_is_decoded(coding: str) -> None:
    """The bucket, the hash and the parser get the file itself, whatever coding it came in."""
    coded = CODINGS[coding](LARGE)
    async with HostileServer(whole(coded, content_encoding=coding)) as server, client_of(server.url) as client:
        await client.fetch_exactly(LARGE)


UNUSUAL_STREAMS = {
    "deflate without zlib": ("deflate", zlib.compress(LARGE)[2:-4]),
    "members of gzip": ("gzip", gzip.compress(LARGE[:5_000]) + gzip.compress(b"") + gzip.compress(LARGE[5_000:])),
    "frames of zstd": (
        "zstd",
        zstd.compress(LARGE[:5_000]) + b"\x50\x2a\x4d\x18\x03\0\0\0..." + zstd.compress(LARGE[5_000:]),
    ),
}


@pytest.mark.parametrize(("coding", "coded"), UNUSUAL_STREAMS.values(), ids=UNUSUAL_STREAMS.keys())
async def test_every_form_of_a_coding_is_decoded(coding: str, coded: bytes) -> None:
    """Streams in several parts, empty and skipped ones among them, and deflate as some servers write it, are files."""
    async with HostileServer(whole(coded, content_encoding=coding)) as server, client_of(server.url) as client:
        await client.fetch_exactly(LARGE)


@pytest.mark.parametrize("coding", ["compress", "gzip, gzip", "aes128gcm", "\xff"])
async def test_a_coding_that_was_not_requested_fails_the_city(coding: str) -> None:
    """Stacked and unknown codings are permanent errors."""
    async with HostileServer(whole(BODY, content_encoding=coding)) as server, client_of(server.url) as client:
        assert "content-encoding" in await client.failure()
        assert len(server.requests) == 1
