"""The operator's rules for trip files: where the records are, and how many may be bad."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

import msgspec

_COUNT = re.compile(r"[0-9]{1,12}")
_PERCENTAGE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")


class BadRecordsMax(msgspec.Struct, frozen=True):
    """How many records of a file may be bad: a number of them, or a percentage of all its records."""

    amount: Decimal = Decimal(0)
    is_percentage: bool = False

    @classmethod
    def parse(cls, written: str) -> BadRecordsMax:
        """Parse a number of records (``100``) or a percentage (``0.5%``). Raises ValueError for anything else."""
        if _COUNT.fullmatch(written):
            return cls(Decimal(written))
        match = _PERCENTAGE.fullmatch(written)
        if match is None or Decimal(match[1]) > 100:
            raise ValueError("it must be a number of records such as 100, or a percentage of them such as 0.5%")
        return cls(Decimal(match[1]), is_percentage=True)

    def allows(self, bad_records: int, *, records: int) -> bool:
        """Return whether a file of ``records`` records may have ``bad_records`` bad ones."""
        if self.is_percentage:
            return 100 * bad_records <= self.amount * records
        return bad_records <= self.amount

    def __str__(self) -> str:
        return f"{self.amount}%" if self.is_percentage else str(self.amount)


PATH_KEYS_MAX: Final = 16
_POINTER = re.compile(r"(?:/(?:[^~/]|~[01])*)+")


class RecordsForm(msgspec.Struct, frozen=True):
    """Where a file has its records: one a line, or in an array, which is the document or is found under ``path``."""

    is_lines: bool = False
    path: tuple[str, ...] = ()

    @classmethod
    def parse(cls, written: str) -> RecordsForm:
        """Parse ``array``, ``lines`` or a JSON Pointer (RFC 6901) like ``/data/trips``. Raises ValueError otherwise."""
        if written == "array":
            return cls()
        if written == "lines":
            return cls(is_lines=True)
        if not _POINTER.fullmatch(written) or written.count("/") > PATH_KEYS_MAX:
            raise ValueError(
                "it must be array, lines, or the path of the array as a JSON Pointer such as /data/trips, "
                f"of at most {PATH_KEYS_MAX} keys (in a key, write ~1 for a slash and ~0 for a tilde)"
            )
        return cls(path=tuple(key.replace("~1", "/").replace("~0", "~") for key in written.split("/")[1:]))

    def __str__(self) -> str:
        if self.is_lines:
            return "lines"
        return pointer(self.path) or "array"


def pointer(path: tuple[str, ...]) -> str:
    """Return keys as a JSON Pointer."""
    return "".join("/" + key.replace("~", "~0").replace("/", "~1") for key in path)


class FileRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of trip files that an operator can set. By default no record may be bad.

    If ``other_dates_are_bad``, a trip that departs on another date than the file's is a bad record.
    """

    form: RecordsForm = RecordsForm()
    bad_records_max: BadRecordsMax = BadRecordsMax()
    other_dates_are_bad: bool = False
