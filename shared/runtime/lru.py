"""A cache bounded in bytes. cachetools raises for an entry larger than the cache; this one does not keep it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class LruCache(Generic[_Key, _Value]):
    """Keeps the values used last, at most ``bytes_max`` of them together; ``size_of`` tells the bytes of an entry."""

    def __init__(self, bytes_max: int, size_of: Callable[[_Key, _Value], int]) -> None:
        self._bytes_max = bytes_max
        self._size_of = size_of
        self._bytes = 0
        self._entries: OrderedDict[_Key, _Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: _Key) -> _Value | None:
        """Return the value kept under ``key``, which counts as a use, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def keep(self, key: _Key, value: _Value) -> None:
        """Keep a value in place of the one before it; the values used least recently make room."""
        self.drop(key)
        self._entries[key] = value
        self._bytes += self._size_of(key, value)
        while self._bytes > self._bytes_max:
            oldest, dropped = self._entries.popitem(last=False)
            self._bytes -= self._size_of(oldest, dropped)

    def drop(self, key: _Key) -> None:
        """Forget ``key``."""
        if key in self._entries:
            self._bytes -= self._size_of(key, self._entries.pop(key))
