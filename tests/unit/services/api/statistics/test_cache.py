"""Caches of the statistics: long responses in bounded memory."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterator

import pytest

from services.api.routes import statistics
from services.api.statistics.cache import Body, ResponseCache
from tests.fakes.api import DAY, World, stats
from tests.fakes.metrics import value

PATH = "/country-stats?from=2024-05-01&to=2024-05-31"


def parts_of(text: bytes, taken: list[bytes]) -> Iterator[bytes]:
    """Yield the bytes of ``text`` one by one; note each that is taken."""
    for place in range(len(text)):
        taken.append(text[place : place + 1])
        yield taken[-1]


async def made(body: Body | None) -> bytes:
    """Return the bytes of a body that the cache had room for."""
    assert body is not None
    return await body.whole()


async def test_a_body_is_made_once_for_all_readers() -> None:
    """Every reader during and after the making gets the whole body, and it is made once."""
    cache, taken = ResponseCache(100), list[bytes]()
    first = cache.begin('"a"', parts_of(b"abc", taken), expected_bytes=10)
    second = cache.find('"a"')
    assert set(await asyncio.gather(made(first), made(second))) == {b"abc"}
    assert await made(cache.find('"a"')) == b"abc"
    assert taken == [b"a", b"b", b"c"]


async def test_slow_reader_does_not_delay_others() -> None:
    """A reader that takes one part and leaves delays no other reader."""
    cache = ResponseCache(100)
    body = cache.begin('"a"', parts_of(b"abc", []), expected_bytes=10)
    assert body is not None
    async for part in body.parts():
        assert part == b"a"
        break
    assert await made(cache.find('"a"')) == b"abc"


async def test_least_recently_used_body_is_evicted() -> None:
    """A new body evicts the least recently used one; a body over the limit evicts none and is not made."""
    cache, taken = ResponseCache(10), list[bytes]()
    for etag in ('"a"', '"b"'):
        await made(cache.begin(etag, parts_of(b"12345", []), expected_bytes=5))
        await asyncio.sleep(0)
    assert cache.find('"a"') is not None
    await made(cache.begin('"c"', parts_of(b"12345", []), expected_bytes=5))
    assert [cache.find(etag) is None for etag in ('"a"', '"b"', '"c"')] == [False, True, False]
    assert cache.begin('"d"', parts_of(b"12345", taken), expected_bytes=11) is None
    assert taken == []


async def test_unfinished_bodies_count_and_are_not_evicted() -> None:
    """An unfinished body counts with its expected size, and no other body evicts it."""
    cache = ResponseCache(10)
    under_way = cache.begin('"a"', parts_of(b"123", []), expected_bytes=6)
    assert cache.begin('"b"', parts_of(b"12345", []), expected_bytes=5) is None
    assert await made(under_way) == b"123"
    await asyncio.sleep(0)
    assert await made(cache.begin('"b"', parts_of(b"12345", []), expected_bytes=5)) == b"12345"


async def test_a_body_larger_than_the_cache_is_sent_and_not_kept() -> None:
    """A body that proves larger than the cache still reaches its readers, and is not kept."""
    cache = ResponseCache(4)
    assert await made(cache.begin('"a"', parts_of(b"12345", []), expected_bytes=3)) == b"12345"
    await asyncio.sleep(0)
    assert cache.find('"a"') is None


async def test_error_while_making_a_body_reaches_its_readers() -> None:
    """An error while a body is made is raised to its readers, and the next request makes it again."""

    def broken() -> Iterator[bytes]:
        yield b"1"
        raise OSError("the disk is full")

    cache = ResponseCache(100)
    body = cache.begin('"a"', broken(), expected_bytes=5)
    with pytest.raises(OSError, match="the disk is full"):
        await made(body)
    await asyncio.sleep(0)
    assert cache.find('"a"') is None


def lookups(result: str) -> float:
    """Return the look-ups in the cache of responses, as the metric counts them."""
    return value("tripfold_cache_requests_total", cache="responses", result=result)


@pytest.mark.parametrize("coding", ["identity", "gzip", "zstd"])
def test_a_cached_response_is_sent_without_reading_heads(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached response has the same bytes and reads no heads; a changed summary makes a new one.

    The cache of heads is empty, so a response that reads no head comes from the cache of responses.
    """
    monkeypatch.setattr(statistics, "BUFFERED_COUNTRY_DAYS_MAX", 0)
    world = World()
    for day in range(31):
        world.fold_in(stats("armenia", DAY + dt.timedelta(days=day)))
    headers = {"Accept-Encoding": coding}
    with world.client(api_cache_bytes=0) as client:

        def ask(known: str = "") -> tuple[int, bytes, str, int]:
            world.store.reads.clear()
            sent = headers | ({"If-None-Match": known} if known else {})
            with client.stream("GET", PATH, headers=sent) as response:
                body = b"".join(response.iter_raw())
            read = sum(key.startswith("summaries/") for key in world.store.reads)
            return response.status_code, body, response.headers["etag"], read

        misses, hits = lookups("miss"), lookups("hit")
        first = ask()
        again = ask()
        assert (first[3], again) == (31, (*first[:3], 0))
        assert (lookups("miss"), lookups("hit")) == (misses + 1, hits + 1)
        assert ask(first[2]) == (304, b"", first[2], 0)
        world.fold_in(stats("armenia", trips=9, revision=6))
        changed = ask(first[2])
        assert changed[0] == 200
        assert changed[2] != first[2]
        assert changed[3] == 31
