"""A cache bounded in bytes."""

from __future__ import annotations

from shared.runtime.lru import LruCache


def test_the_least_recently_used_values_are_evicted() -> None:
    """A use counts, a replaced value frees its bytes, and a value larger than the cache is not kept."""
    cache: LruCache[str, bytes] = LruCache(10, lambda _, value: len(value))
    cache.keep("a", bytes(4))
    cache.keep("b", bytes(4))
    assert cache.get("a") == bytes(4)
    cache.keep("c", bytes(4))
    assert [cache.get(key) for key in "abc"] == [bytes(4), None, bytes(4)]
    cache.keep("c", bytes(6))
    assert (cache.get("a"), len(cache)) == (bytes(4), 2)
    cache.drop("a")
    cache.drop("a")
    cache.keep("d", bytes(4))
    assert (cache.get("c"), len(cache)) == (bytes(6), 2)
    cache.keep("e", bytes(11))
    assert len(cache) == 0
