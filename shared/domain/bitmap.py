"""Sets of small integers as bitmaps: an integer in memory, hexadecimal digits in JSON, bit n for member n."""

from __future__ import annotations


def decode(digits: str) -> int:
    """Return the bitmap that hexadecimal digits spell."""
    return int(digits, 16)


def encode(bitmap: int) -> str:
    """Return a bitmap in hexadecimal digits."""
    return f"{bitmap:x}"


def member(position: int) -> int:
    """Return the set of ``position`` alone."""
    return 1 << position


def contains(bitmap: int, position: int) -> bool:
    """Tell whether ``position`` is in the set."""
    return bool(bitmap >> position & 1)


def size(digits: str) -> int:
    """Return how many members a set in hexadecimal digits has."""
    return int(digits, 16).bit_count()
