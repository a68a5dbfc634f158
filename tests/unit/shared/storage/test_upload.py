"""Calls of an upload to S3: as few as possible, in parts that any store accepts."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from bench.null_s3 import NullS3
from shared.runtime.settings import load_settings
from shared.storage.object_store import UPLOAD_PART_BYTES
from shared.storage.s3 import S3Store

CHUNK_BYTES = 700_001


@pytest.fixture
def server() -> Iterator[NullS3]:
    """Run an S3 that counts its calls."""
    with NullS3() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest_asyncio.fixture
async def store(server: NullS3, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[S3Store]:
    """Open its bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "asks")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    async with S3Store(load_settings({"TRIPFOLD_S3_ENDPOINT_URL": url, "TRIPFOLD_S3_BUCKET": "counted"})) as real:
        yield real


async def upload(store: S3Store, size_bytes: int) -> None:
    """Upload so many bytes, chunk by chunk."""
    uploaded = store.upload("raw/one.json")
    for begin in range(0, size_bytes, CHUNK_BYTES):
        await uploaded.write(bytes(min(CHUNK_BYTES, size_bytes - begin)))
    await uploaded.complete()
    await uploaded.abort()


@pytest.mark.parametrize("size_bytes", [0, 1, UPLOAD_PART_BYTES - 1])
async def test_a_file_below_one_part_costs_one_put_object(server: NullS3, store: S3Store, size_bytes: int) -> None:
    """An upload shorter than one part is a single PutObject: nothing is begun, completed or aborted."""
    await upload(store, size_bytes)
    assert server.calls == {"PutObject": 1}


async def test_a_larger_file_costs_one_call_a_part_and_two(server: NullS3, store: S3Store) -> None:
    """Every part but the last has the same size, which some stores insist on."""
    await upload(store, 2 * UPLOAD_PART_BYTES + 1)
    assert server.calls == {"CreateMultipartUpload": 1, "UploadPart": 3, "CompleteMultipartUpload": 1}
    assert sorted(server.part_sizes_bytes) == [1, UPLOAD_PART_BYTES, UPLOAD_PART_BYTES]


async def test_an_abandoned_upload_is_aborted(server: NullS3, store: S3Store) -> None:
    """The abort is sent at once, so that no parts are left for the clean-up; a second abort sends nothing."""
    given_up = store.upload("raw/one.json")
    await given_up.write(bytes(UPLOAD_PART_BYTES + 1))
    await given_up.abort()
    await given_up.abort()
    assert server.calls["AbortMultipartUpload"] == 1
    assert server.calls["CompleteMultipartUpload"] == 0
