"""Long answers that are made once: kept under their ETags, in bounded memory."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterator

import pytest

from services.api.routes import statistics
from services.api.statistics.cache import Body, ResponseCache
from tests.fakes.api import DAY, World, stats

PATH = "/country-stats?from=2024-05-01&to=2024-05-31"


def parts_of(text: bytes, taken: list[bytes]) -> Iterator[bytes]:
    """Yield the bytes of ``text`` one by one; note each that is taken."""
    for place in range(len(text)):
        taken.append(text[place : place + 1])
        yield taken[-1]


async def made(body: Body | None) -> bytes:
    """Return a body that there was room for."""
    assert body is not None
    return await body.whole()


async def test_made_once() -> None:
    """Everybody who asks while a body is made, or after it, gets all of it, and it is made once."""
    answers, taken = ResponseCache(100), list[bytes]()
    first = answers.begin('"a"', parts_of(b"abc", taken), expected_bytes=10)
    second = answers.find('"a"')
    assert set(await asyncio.gather(made(first), made(second))) == {b"abc"}
    assert await made(answers.find('"a"')) == b"abc"
    assert taken == [b"a", b"b", b"c"]


async def test_slow_reader_does_not_delay_others() -> None:
    """A reader that takes one part and goes holds up nobody."""
    answers = ResponseCache(100)
    body = answers.begin('"a"', parts_of(b"abc", []), expected_bytes=10)
    assert body is not None
    async for part in body.parts():
        assert part == b"a"
        break
    assert await made(answers.find('"a"')) == b"abc"


async def test_least_recently_used_body_is_evicted() -> None:
    """The body used least recently goes for a new one; none goes for one too large, and nothing of that is made."""
    answers, taken = ResponseCache(10), list[bytes]()
    for etag in ('"a"', '"b"'):
        await made(answers.begin(etag, parts_of(b"12345", []), expected_bytes=5))
        await asyncio.sleep(0)
    assert answers.find('"a"') is not None
    await made(answers.begin('"c"', parts_of(b"12345", []), expected_bytes=5))
    assert [answers.find(etag) is None for etag in ('"a"', '"b"', '"c"')] == [False, True, False]
    assert answers.begin('"d"', parts_of(b"12345", taken), expected_bytes=11) is None
    assert taken == []


async def test_bodies_under_way_count() -> None:
    """Bodies under way take the room that is expected of them, and are not given up for another."""
    answers = ResponseCache(10)
    under_way = answers.begin('"a"', parts_of(b"123", []), expected_bytes=6)
    assert answers.begin('"b"', parts_of(b"12345", []), expected_bytes=5) is None
    assert await made(under_way) == b"123"
    await asyncio.sleep(0)
    assert await made(answers.begin('"b"', parts_of(b"12345", []), expected_bytes=5)) == b"12345"


async def test_larger_than_expected() -> None:
    """A body that turns out larger than all the room is sent to those who wait for it, and not kept."""
    answers = ResponseCache(4)
    assert await made(answers.begin('"a"', parts_of(b"12345", []), expected_bytes=3)) == b"12345"
    await asyncio.sleep(0)
    assert answers.find('"a"') is None


async def test_error_while_making_a_body_reaches_its_readers() -> None:
    """An error while a body is made is raised to its readers, and the next request makes it again."""

    def broken() -> Iterator[bytes]:
        yield b"1"
        raise OSError("the disk is full")

    answers = ResponseCache(100)
    body = answers.begin('"a"', broken(), expected_bytes=5)
    with pytest.raises(OSError, match="the disk is full"):
        await made(body)
    await asyncio.sleep(0)
    assert answers.find('"a"') is None


@pytest.mark.parametrize("coding", ["identity", "gzip", "zstd"])
def test_kept_answer(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer that was made before is the same bytes, without a head being read; a changed number makes another.

    The cache of heads is empty: what is answered without reading one is what was kept.
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
            with client.stream("GET", PATH, headers=sent) as answer:
                body = b"".join(answer.iter_raw())
            read = sum(key.startswith("summaries/") for key in world.store.reads)
            return answer.status_code, body, answer.headers["etag"], read

        first = ask()
        again = ask()
        assert (first[3], again) == (31, (*first[:3], 0))
        assert ask(first[2]) == (304, b"", first[2], 0)
        world.fold_in(stats("armenia", trips=9, revision=6))
        changed = ask(first[2])
        assert changed[0] == 200
        assert changed[2] != first[2]
        assert changed[3] == 31
