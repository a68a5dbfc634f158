"""What an operator may decide about trip files: how many bad records a file may have, and what counts as one."""

from __future__ import annotations

import re
from decimal import Decimal

import msgspec

_COUNT = re.compile(r"[0-9]{1,12}")
_PERCENTAGE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")


class BadRecordsMax(msgspec.Struct, frozen=True):
    """How many records of a file may be bad: a number of them, or a percentage of all its records."""

    amount: Decimal = Decimal(0)
    is_percentage: bool = False

    @classmethod
    def parse(cls, written: str) -> BadRecordsMax:
        """Read ``100`` as so many records and ``0.5%`` as that part of them; raise `ValueError` for anything else."""
        if _COUNT.fullmatch(written):
            return cls(Decimal(written))
        match = _PERCENTAGE.fullmatch(written)
        if match is None or Decimal(match[1]) > 100:
            raise ValueError("expected a number of records such as 100, or a percentage of them such as 0.5%")
        return cls(Decimal(match[1]), is_percentage=True)

    def allows(self, bad_records: int, *, records: int) -> bool:
        """Tell whether so many of a file's records may be bad."""
        if self.is_percentage:
            return 100 * bad_records <= self.amount * records
        return bad_records <= self.amount

    def __str__(self) -> str:
        return f"{self.amount}%" if self.is_percentage else str(self.amount)


class FileRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of a file that an operator sets. Without a word from them, no record may be bad.

    With `other_dates_are_bad`, so is a trip that departs on another date than the file's.
    """

    bad_records_max: BadRecordsMax = BadRecordsMax()
    other_dates_are_bad: bool = False
