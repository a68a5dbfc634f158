"""An LRU cache with a limit in bytes.

cachetools raises for an entry larger than the whole cache; this cache does not store it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class LruCache(Generic[_Key, _Value]):
    """Keeps the most recently used values, at most ``bytes_max`` in all; ``size_of`` returns the bytes of an entry."""

    def __init__(self, bytes_max: int, size_of: Callable[[_Key, _Value], int]) -> None:
        self._bytes_max = bytes_max
        self._size_of = size_of
        self._bytes = 0
        self._entries: OrderedDict[_Key, _Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._entries)

    def get(self, key: _Key) -> _Value | None:
        """Return the value of ``key``, or None. This counts as a use."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def keep(self, key: _Key, value: _Value) -> None:
        """Store a value, and evict the least recently used ones that no longer fit."""
        self.drop(key)
        self._entries[key] = value
        self._bytes += self._size_of(key, value)
        while self._bytes > self._bytes_max:
            oldest, dropped = self._entries.popitem(last=False)
            self._bytes -= self._size_of(oldest, dropped)

    def drop(self, key: _Key) -> None:
        """Remove ``key``."""
        if key in self._entries:
            self._bytes -= self._size_of(key, self._entries.pop(key))
