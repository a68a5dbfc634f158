"""Sets of small integers as bitmaps: an integer in memory, hexadecimal digits in JSON. Bit n stands for member n."""

from __future__ import annotations


def decode(digits: str) -> int:
    """Return the bitmap of hexadecimal digits."""
    return int(digits, 16)


def encode(bitmap: int) -> str:
    """Return a bitmap in hexadecimal digits."""
    return f"{bitmap:x}"


def member(position: int) -> int:
    """Return the set with only ``position``."""
    return 1 << position


def contains(bitmap: int, position: int) -> bool:
    """Return whether ``position`` is in the set."""
    return bool(bitmap >> position & 1)


def members(digits: str) -> list[int]:
    """Return the members of a set in hexadecimal digits, in order."""
    bitmap = decode(digits)
    return [position for position in range(bitmap.bit_length()) if contains(bitmap, position)]


def size(digits: str) -> int:
    """Return the number of members of a set in hexadecimal digits."""
    return int(digits, 16).bit_count()
