"""The reference upstream over HTTP: what a client sees on a real socket."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import date

import httpx
import pytest
import pytest_asyncio
import uvicorn

from tripfold.local.ports import free_port
from tripfold.local.trip_files import TripFile, UpstreamOptions, city_list, trip_file
from tripfold.local.upstream import CuttingServer, create_app

DEADLINE_S = 20.0
DAY = date(2024, 5, 1)
OPTIONS = UpstreamOptions(cities=4, trips_per_city=3000)
FILE = trip_file(OPTIONS, 1, DAY)
BODY = b"".join(FILE.read())
PATH = "/cities/1/stats?date=2024-05-01"
# 112 TB: no test reads to its end.
ENDLESS = UpstreamOptions(cities=2, trips_per_city=10**12)


# One loop for all, so that most tests can share one server.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def serving(options: UpstreamOptions) -> AsyncIterator[httpx.AsyncClient]:
    """Run the upstream on a free port, and give a client of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = CuttingServer(uvicorn.Config(create_app(options), log_level="warning", access_log=False))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await eventually(lambda: server.started)
        async with client_of(listener.getsockname()[1]) as client:
            yield client
    finally:
        server.should_exit = True
        await running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """Give a client of one server with OPTIONS to all tests of this module."""
    async with serving(OPTIONS) as client:
        yield client


def client_of(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=DEADLINE_S)


async def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.01)


async def test_cities_are_a_json_array(client: httpx.AsyncClient) -> None:
    """The cities come as a JSON array of id, name and country, beyond ASCII too."""
    response = await client.get("/cities")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json()[1] == {"id": 1, "name": "Grand-Béréby", "country": "Côte d'Ivoire"}
    assert [city["id"] for city in response.json()] == [city.id for city in city_list(OPTIONS)]


async def test_a_file_has_its_length_and_etag(client: httpx.AsyncClient) -> None:
    """A file comes whole, with its length, its ETag and the offer of ranges."""
    response = await client.get(PATH)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-length"] == str(len(BODY))
    assert response.headers["etag"] == FILE.etag
    assert response.headers["accept-ranges"] == "bytes"
    assert "last-modified" not in response.headers
    assert response.content == BODY
    assert len(json.loads(response.content)) == 3000


async def test_a_city_day_without_trips_is_an_empty_array() -> None:
    """A city-day without trips is an empty array."""
    async with serving(UpstreamOptions(trips_per_city=0)) as client:
        assert (await client.get(PATH)).content == b"[]"


async def test_head_has_the_headers_of_the_whole_file(client: httpx.AsyncClient) -> None:
    """HEAD gives the headers of the whole file, whatever range it names, and no body."""
    response = await client.head(PATH, headers={"Range": "bytes=0-9"})
    assert response.status_code == 200
    assert response.headers["content-length"] == str(len(BODY))
    assert response.headers["content-type"] == "application/json"
    assert response.headers["etag"] == FILE.etag
    assert response.content == b""


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("if_none_match", "status"),
    [
        (FILE.etag, 304),
        (f"W/{FILE.etag}", 304),
        (f'"other", {FILE.etag}', 304),
        ("*", 304),
        ('"other"', 200),
        (FILE.etag.strip('"'), 200),
    ],
)
async def test_if_none_match_of_the_current_etag_is_304(
    client: httpx.AsyncClient, method: str, if_none_match: str, status: int
) -> None:
    """A client whose copy is current gets a 304 without a body; any other gets the file."""
    response = await client.request(method, PATH, headers={"If-None-Match": if_none_match})
    assert response.status_code == status
    assert response.headers["etag"] == FILE.etag
    if status == 304:
        assert response.content == b""


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-200000", 5, 200_001),
        ("bytes=300000-", 300_000, len(BODY)),
        ("bytes=-10", len(BODY) - 10, len(BODY)),
        ("bytes=-99999999", 0, len(BODY)),
        ("bytes=7-99999999", 7, len(BODY)),
        ("Bytes=0-1", 0, 2),
    ],
)
async def test_one_range_returns_its_bytes(client: httpx.AsyncClient, header: str, start: int, stop: int) -> None:
    """One range is answered with exactly its bytes and where they lie in the file."""
    response = await client.get(PATH, headers={"Range": header})
    assert response.status_code == 206
    assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(BODY)}"
    assert response.headers["content-length"] == str(stop - start)
    assert response.headers["etag"] == FILE.etag
    assert response.content == BODY[start:stop]


@pytest.mark.parametrize("header", [f"bytes={len(BODY)}-", "bytes=99999999-99999999", "bytes=-0"])
async def test_an_unsatisfiable_range_is_416(client: httpx.AsyncClient, header: str) -> None:
    """A range without a byte of the file is 416 and names the file's length."""
    response = await client.get(PATH, headers={"Range": header})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(BODY)}"
    assert "no byte of a file" in response.json()["detail"]


@pytest.mark.parametrize(
    "header", ["bytes=5-2", "bytes=-", "bytes=0-1,5-6", "lines=0-1", "bytes=x-", "bytes=" + "9" * 50 + "-"]
)
async def test_an_invalid_range_is_ignored(client: httpx.AsyncClient, header: str) -> None:
    """A range that is malformed, of another unit or one of several is ignored: the whole file comes."""
    response = await client.get(PATH, headers={"Range": header})
    assert response.status_code == 200
    assert response.content == BODY


@pytest.mark.parametrize(
    ("if_range", "status"),
    [
        (FILE.etag, 206),
        (f"W/{FILE.etag}", 200),
        ('"other"', 200),
        ("Wed, 01 May 2024 00:00:00 GMT", 200),
    ],
)
async def test_if_range_of_another_etag_returns_the_whole_file(
    client: httpx.AsyncClient, if_range: str, status: int
) -> None:
    """A range of the file the client knows comes as a part; of any other file the whole comes."""
    response = await client.get(PATH, headers={"Range": "bytes=10-19", "If-Range": if_range})
    assert response.status_code == status
    assert response.content == (BODY[10:20] if status == 206 else BODY)


async def test_current_copy_wins_over_range(client: httpx.AsyncClient) -> None:
    """A current copy gets 304 even when the request has a range."""
    response = await client.get(PATH, headers={"Range": "bytes=0-9", "If-None-Match": FILE.etag})
    assert response.status_code == 304


async def test_etags_can_be_off() -> None:
    """The upstream sends no ETag and ignores conditions when ETags are off."""
    async with serving(UpstreamOptions(cities=4, trips_per_city=3000, etag=False)) as client:
        plain = await client.get(PATH, headers={"If-None-Match": "*"})
        resumed = await client.get(PATH, headers={"Range": "bytes=0-9", "If-Range": FILE.etag})
    assert (plain.status_code, resumed.status_code) == (200, 200)
    assert "etag" not in plain.headers
    assert plain.content == resumed.content == BODY


async def test_ranges_can_be_off() -> None:
    """The upstream offers no ranges and sends the whole file when ranges are off."""
    async with serving(UpstreamOptions(cities=4, trips_per_city=3000, ranges=False)) as client:
        response = await client.get(PATH, headers={"Range": "bytes=0-9"})
    assert response.status_code == 200
    assert "accept-ranges" not in response.headers
    assert response.content == BODY


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/cities/4/stats?date=2024-05-01", 404),
        ("/cities/-1/stats?date=2024-05-01", 404),
        ("/cities/Tina/stats?date=2024-05-01", 404),
        ("/cities/1/stats", 400),
        ("/cities/1/stats?date=", 400),
        ("/cities/1/stats?date=yesterday", 400),
        ("/cities/1/stats?date=2024-02-30", 400),
        ("/cities/1/stats?date=20240501", 400),
        ("/cities/1/stats?date=2024-05-01T00:00:00", 400),
    ],
)
async def test_errors_are_json(client: httpx.AsyncClient, path: str, status: int) -> None:
    """An unknown city is 404 and a missing or bad date 400, each with a JSON body that says so."""
    response = await client.get(path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["status_code"] == status
    assert response.json()["detail"]


async def test_a_missing_day_is_404() -> None:
    """A missing day of a known city is 404."""
    async with serving(UpstreamOptions(missing_days=100)) as client:
        response = await client.get(PATH)
    assert response.status_code == 404
    assert response.json()["detail"] == "city 1 has no file for 2024-05-01"


async def test_a_running_upstream_is_healthy(client: httpx.AsyncClient) -> None:
    """A running upstream says that it is well."""
    response = await client.get("/health")
    assert response.status_code == 200


async def test_a_disconnected_client_ends_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the client of an endless stream leaves, the stream ends and the server goes on answering."""
    ended = threading.Event()
    read = TripFile.read

    def watched(file: TripFile, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        try:
            yield from read(file, start, stop)
        finally:
            ended.set()

    def is_over() -> bool:
        # Litestar leaves the iterator of a cancelled stream to the garbage collector.
        gc.collect()
        return ended.is_set()

    monkeypatch.setattr(TripFile, "read", watched)
    async with serving(ENDLESS) as client:
        async with client.stream("GET", PATH) as response:
            await anext(response.aiter_raw())
            assert not is_over()
        await eventually(is_over)
        assert (await client.get("/health")).status_code == 200


async def test_an_endless_stream_does_not_block_another_response() -> None:
    """A short answer comes while an endless file streams to a client that takes all it can."""
    async with serving(ENDLESS) as client, client.stream("GET", PATH) as response:
        chunks = response.aiter_raw()
        await anext(chunks)
        taking = asyncio.create_task(read_all(chunks))
        assert (await client.get("/health")).status_code == 200
        assert not taking.done()
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)


async def test_serve_stops_during_a_stream() -> None:
    """A served process that is asked to stop cuts the streams still running, and ends without a complaint."""
    port = free_port("the upstream of a test")
    program = (
        "from tripfold.local import upstream\n"
        "upstream.SHUTDOWN_GRACE_S = 20\n"
        f"upstream.serve(upstream.UpstreamOptions(cities=2, trips_per_city=10**12), '127.0.0.1', {port})"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE)
    try:
        async with client_of(port) as client:
            await until_healthy(client, process)
            async with client.stream("GET", PATH) as response:
                chunks = response.aiter_raw()
                await anext(chunks)
                process.terminate()
                with pytest.raises(httpx.TransportError):
                    await asyncio.wait_for(read_all(chunks), DEADLINE_S)
        _, complaint = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert complaint == b""
    assert process.returncode == -signal.SIGTERM


async def read_all(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


async def until_healthy(client: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert process.returncode is None, "the server ended before it was ready"
        assert time.monotonic() < deadline, "the server was not ready in time"
        try:
            (await client.get("/health")).raise_for_status()
        except httpx.TransportError:
            await asyncio.sleep(0.02)
        else:
            return
