"""Sets of small integers as bitmaps: an integer in memory, hexadecimal digits in JSON, bit n for member n."""

from __future__ import annotations


def contains(bitmap: str, member: int) -> bool:
    """Tell whether ``member`` is in the set."""
    return bool(int(bitmap, 16) >> member & 1)


def with_member(bitmap: str, member: int) -> str:
    """Return the set with ``member`` in it."""
    return f"{int(bitmap, 16) | 1 << member:x}"


def without_member(bitmap: str, member: int) -> str:
    """Return the set without ``member``."""
    return f"{int(bitmap, 16) & ~(1 << member):x}"


def size(bitmap: str) -> int:
    """Return how many members the set has."""
    return int(bitmap, 16).bit_count()
