"""Finds a country by the text of a client: its slug, or its name if that is unique."""

from __future__ import annotations

import asyncio
import difflib
import re
import unicodedata
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from services.api.http.errors import NotFound, quoted
from shared.domain.ids import SLUG_LENGTH_MAX, CountrySlug

NEAREST_MAX = 3
_SLUG = re.compile(rf"[a-z0-9-]{{1,{SLUG_LENGTH_MAX}}}")


class Country(NamedTuple):
    """The slug of a country. A country that is not ``listed`` exists only if the bucket has summaries of it."""

    slug: CountrySlug
    listed: bool


class CountryNames:
    """Finds countries. Slugs never change, so the list is read again only for an unknown text."""

    def __init__(self, read: Callable[[], Awaitable[Mapping[str, CountrySlug]]]) -> None:
        self._read = read
        self._slugs: Mapping[str, CountrySlug] = {}

    async def find_or_all(self, text: str | None) -> tuple[CountrySlug | None, bool]:
        """Return the result of `find`, or ``(None, True)`` for all countries if ``text`` is None."""
        return (None, True) if text is None else await self.find(text)

    async def find(self, text: str) -> Country:
        """Return the country of ``text``. A country that the list lacks is found by its slug.

        Raises NotFound if no country, or more than one, has this name.
        """
        slug = slug_of(text, self._slugs)
        if slug is None:
            self._slugs = await self._read()
            slug = slug_of(text, self._slugs)
        if slug is not None:
            return Country(slug, listed=True)
        if not _SLUG.fullmatch(text):
            raise await self.unknown(text)
        return Country(CountrySlug(text), listed=False)

    async def unknown(self, text: str) -> NotFound:
        """Return the error for an unknown country. It suggests countries with similar names."""
        nearest = await asyncio.to_thread(nearest_to, text, self._slugs)
        hint = (
            f" Did you mean {' or '.join(nearest)}?"
            if nearest
            else " GET /country-stats lists the countries that have data."
        )
        return NotFound(f"There is no country {quoted(text)}.{hint}")


def slug_of(text: str, slugs: Mapping[str, CountrySlug]) -> CountrySlug | None:
    """Return the country's slug if ``text`` is its slug or name; None if no country, or several, have the name."""
    normalized = _normalized(text)
    if normalized in slugs.values():
        return CountrySlug(normalized)
    named = {slug for name, slug in slugs.items() if _normalized(name) == normalized}
    return named.pop() if len(named) == 1 else None


def nearest_to(text: str, slugs: Mapping[str, CountrySlug]) -> list[CountrySlug]:
    """Return the slugs of the countries whose names or slugs are most similar to ``text``, best first."""
    spellings = [(_normalized(name), slug) for name, slug in slugs.items()] + [(slug, slug) for slug in slugs.values()]
    near = difflib.get_close_matches(_normalized(text), {spelling for spelling, _ in spellings}, n=2 * NEAREST_MAX)
    found = (slug for one in near for spelling, slug in spellings if spelling == one)
    return list(dict.fromkeys(found))[:NEAREST_MAX]


def _normalized(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())
