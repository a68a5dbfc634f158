"""Countries as clients write them: a slug, or a name that only one country has."""

from __future__ import annotations

import asyncio
import difflib
import re
import unicodedata
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from services.api.http.errors import NotFound, shown
from shared.domain.ids import SLUG_LENGTH_MAX, CountrySlug

NEAREST_MAX = 3
_SLUG = re.compile(rf"[a-z0-9-]{{1,{SLUG_LENGTH_MAX}}}")


class Country(NamedTuple):
    """The slug of a country. One that is not ``listed`` exists only if the bucket has summaries of it."""

    slug: CountrySlug
    listed: bool


class CountryNames:
    """Finds the country that a text means. Slugs never change, so the list is read again only for an unknown text."""

    def __init__(self, read: Callable[[], Awaitable[Mapping[str, CountrySlug]]]) -> None:
        self._read = read
        self._slugs: Mapping[str, CountrySlug] = {}

    async def find_or_all(self, text: str | None) -> tuple[CountrySlug | None, bool]:
        """Return what `find` does; None stands for all countries."""
        return (None, True) if text is None else await self.find(text)

    async def find(self, text: str) -> Country:
        """Return the country that ``text`` means. One that the list lacks is still found by its slug.

        Raises NotFound if no country, or more than one, is called so.
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
        """Return the error for a country that was not found. It names those with the nearest names."""
        nearest = await asyncio.to_thread(nearest_to, text, self._slugs)
        hint = f" Did you mean {' or '.join(nearest)}?" if nearest else " GET /country-stats names all that have data."
        return NotFound(f"There is no country {shown(text)}.{hint}")


def slug_of(text: str, slugs: Mapping[str, CountrySlug]) -> CountrySlug | None:
    """Return the slug that ``text`` is, or the one that its name has; None if several countries have the name."""
    folded = _folded(text)
    if folded in slugs.values():
        return CountrySlug(folded)
    named = {slug for name, slug in slugs.items() if _folded(name) == folded}
    return named.pop() if len(named) == 1 else None


def nearest_to(text: str, slugs: Mapping[str, CountrySlug]) -> list[CountrySlug]:
    """Return the slugs whose countries are written most like ``text``, the nearest first."""
    spellings = [(_folded(name), slug) for name, slug in slugs.items()] + [(slug, slug) for slug in slugs.values()]
    near = difflib.get_close_matches(_folded(text), {spelling for spelling, _ in spellings}, n=2 * NEAREST_MAX)
    found = (slug for one in near for spelling, slug in spellings if spelling == one)
    return list(dict.fromkeys(found))[:NEAREST_MAX]


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())
