"""Mints country slugs, the names of countries in keys, events and URLs. Pure: only the planner stores new slugs."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from slugify import slugify

from shared.domain.ids import CountrySlug
from shared.domain.objects import Countries

SLUG_READABLE_LENGTH_MAX = 80

_SLUG = re.compile(r"[a-z0-9-]*")


def mint_slugs(known: Countries, names: Iterable[str]) -> Countries:
    """Mint a slug for each name in NFC that has none. Minted slugs never change; returns ``known`` if none is new.

    Names that differ only in case or surrounding white space are one country with one slug. A slug has at most 80
    readable characters. If it is empty or taken by another name, it gets a dash and eight hex digits of the name's
    SHA-256 (and more digits if that slug is taken too).
    """
    new = sorted(set(names) - known.slugs.keys())
    if not new:
        return known
    slugs = dict(known.slugs)
    taken = set(slugs.values())
    by_comparable: dict[str, CountrySlug] = {}
    for name, slug in slugs.items():
        by_comparable.setdefault(_comparable(name), slug)
    for name in new:
        if (slug_of_another_spelling := by_comparable.get(_comparable(name))) is not None:
            slugs[name] = slug_of_another_spelling
            continue
        readable = slugify(name, max_length=SLUG_READABLE_LENGTH_MAX)
        slug = CountrySlug(readable if _SLUG.fullmatch(readable) else "")
        digest = hashlib.sha256(name.encode()).hexdigest()
        digits = 8
        while not slug or slug in taken:
            slug = CountrySlug(f"{readable[: SLUG_READABLE_LENGTH_MAX + 8 - digits]}-{digest[:digits]}")
            digits += 8
        slugs[name] = by_comparable[_comparable(name)] = slug
        taken.add(slug)
    return Countries(slugs=dict(sorted(slugs.items())))


def _comparable(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip().casefold())
