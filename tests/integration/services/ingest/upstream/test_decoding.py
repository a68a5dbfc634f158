"""Content-codings: every form of them is decoded, in bounded memory and in short steps."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import msgspec
import pytest

from services.ingest.upstream import client as upstream_client
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError
from shared.runtime import zstd
from tests.integration.services.ingest.upstream.client import (
    BODY,
    BOMB,
    DAY,
    LARGE,
    client_of,
)
from tests.integration.services.ingest.upstream.hostile import (
    HostileServer,
    whole,
)

CODINGS: dict[str, Callable[[bytes], bytes]] = {
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


BROTLI_OF_ONE_BYTE = bytes.fromhex("0000f0ff0010") + bytes(65) + bytes.fromhex("80d8e1004011166181400006")
"""A meta-block that makes one byte, and fills and transforms a context map of 16 KiB for it."""

BUSY_BODIES = {
    "empty gzip members": ("gzip", gzip.compress(b"") * 20_000),
    "gzip members of one byte": ("gzip", gzip.compress(b" ") * 20_000),
    "empty zstd frames": ("zstd", zstd.compress(b"") * 20_000),
    "skippable zstd frames": ("zstd", b"\x50\x2a\x4d\x18\0\0\0\0" * 20_000),
    "zstd blocks of 128 KiB": ("zstd", b"\x28\xb5\x2f\xfd\0\x58" + b"\x02\0\x10 " * 20_000),
    "deflate blocks of nothing": ("deflate", b"\x78\x9c" + b"\0\0\0\xff\xff" * 20_000),
    "brotli context maps": ("br", b"\x0c" + BROTLI_OF_ONE_BYTE * 4_000),
    **{f"spaces in {coding}": (coding, compress(BOMB)) for coding, compress in CODINGS.items()},
}


class Work(msgspec.Struct):
    """The work of the libraries since the latest turn of the event loop, and the most that any turn had to wait for."""

    calls: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    calls_max: int = 0
    input_bytes_max: int = 0
    output_bytes_max: int = 0

    def counted(self, call: Callable[..., bytes]) -> Callable[..., bytes]:
        """Return a function that counts the work of ``call``."""

        def run(data: bytes, *args: Any, **options: Any) -> bytes:
            made = call(data, *args, **options)
            # A call copies the input that it leaves.
            self.calls += 1
            self.input_bytes += len(data)
            self.output_bytes += len(made)
            self.calls_max = max(self.calls_max, self.calls)
            self.input_bytes_max = max(self.input_bytes_max, self.input_bytes)
            self.output_bytes_max = max(self.output_bytes_max, self.output_bytes)
            return made

        return run

    async def watch(self) -> None:
        """Begin anew at each turn of the event loop."""
        while True:
            self.calls = self.input_bytes = self.output_bytes = 0
            await asyncio.sleep(0)


class Watched:
    """A decompressor of a library whose work is counted."""

    def __init__(self, stream: Any, work: Work) -> None:
        self._stream = stream
        self._work = work

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stream, name)
        return self._work.counted(value) if name in {"decompress", "process"} else value


@pytest.mark.parametrize(("coding", "body"), BUSY_BODIES.values(), ids=BUSY_BODIES.keys())
async def test_the_event_loop_has_a_turn_after_little_work(
    coding: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much work a body means and however little comes out, decoding it never blocks the event loop."""
    work = Work()
    for library, name in ((zlib, "decompressobj"), (brotli, "Decompressor"), (zstd, "ZstdDecompressor")):
        make = getattr(library, name)
        monkeypatch.setattr(library, name, lambda *args, make=make, **options: Watched(make(*args, **options), work))
    async with HostileServer(whole(body, content_encoding=coding)) as server, client_of(server.url) as client:
        watching = asyncio.create_task(work.watch())
        chunks = chunk_bytes = 0
        with contextlib.suppress(PermanentUpstreamError, TransientUpstreamError):
            async with client.upstream.download("1", DAY, None) as download:
                assert download.chunks is not None
                async for chunk in download.chunks:
                    chunks, chunk_bytes = chunks + 1, chunk_bytes + len(chunk)
        watching.cancel()
    assert 0 < work.calls_max <= 8
    assert work.input_bytes_max <= (4 if coding == "br" else 32) * 1024
    assert work.output_bytes_max <= 512 * 1024
    assert chunks <= 1 + max(len(body), chunk_bytes) // (8 * 1024), "many tiny chunks are work too"


@pytest.mark.parametrize("coding", ["compress", "gzip, gzip", "aes128gcm", "\xff"])
async def test_a_coding_that_was_not_requested_fails_the_city(coding: str) -> None:
    """Stacked and unknown codings are permanent errors."""
    async with HostileServer(whole(BODY, content_encoding=coding)) as server, client_of(server.url) as client:
        assert "content-encoding" in await client.failure()
        assert len(server.requests) == 1
