"""Country slugs: readable, different for different names, and minted once."""

from __future__ import annotations

import hashlib
import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.planner.country_slugs import mint_slugs
from shared.domain.ids import (
    SLUG_LENGTH_MAX,
    CountryField,
    CountrySlug,
)
from shared.domain.objects import Countries


def slug_of(name: str, known: Countries | None = None) -> CountrySlug:
    return mint_slugs(known or Countries(), [name]).slugs[name]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Armenia", "armenia"),
        ("Côte d’Ivoire", "cote-divoire"),
        ("Россия", "rossiia"),
        ("  Åland  ", "aland"),
        ("São Tomé / Príncipe", "sao-tome-principe"),
    ],
)
def test_a_readable_name_is_its_slug(name: str, slug: str) -> None:
    """A name that can be written in ASCII is called so."""
    assert slug_of(name) == slug


@pytest.mark.parametrize("name", ["🇫🇷", "!!!", "-", "—"])
def test_a_name_without_letters_is_a_hash(name: str) -> None:
    """A name of which nothing can be written is a dash and eight hex digits, always the same."""
    slug = slug_of(name)
    assert len(slug) == 9
    assert slug[0] == "-"
    assert slug == slug_of(name)
    assert int(slug[1:], 16) >= 0


def test_two_names_never_share_a_slug() -> None:
    """If two names have the same readable slug, the later one gets a hash."""
    first = mint_slugs(Countries(), ["Россия"])
    both = mint_slugs(first, ["Rossiia"])
    assert both.slugs["Россия"] == "rossiia"
    assert both.slugs["Rossiia"].startswith("rossiia-")
    assert slug_of("Россия", mint_slugs(Countries(), ["Rossiia"])).startswith("rossiia-")


def test_a_name_equal_to_the_hash_slug_of_another_gets_a_longer_hash() -> None:
    """Even a name that is written like the slug of another name gets a slug of its own."""
    taken = mint_slugs(Countries(), ["Rossiia", "Россия"])
    impostor = taken.slugs["Россия"]
    slugs = mint_slugs(taken, [impostor, f"{impostor}!"]).slugs
    assert len(set(slugs.values())) == len(slugs)


def test_a_digest_that_is_taken_gets_more_digits() -> None:
    """Eight digits more at a time, until the slug is free."""
    digest = hashlib.sha256(b"Peru!").hexdigest()
    taken = {name: CountrySlug(name) for name in ("peru", f"peru-{digest[:8]}", f"peru-{digest[:16]}")}
    assert mint_slugs(Countries(slugs=taken), ["Peru!"]).slugs["Peru!"] == f"peru-{digest[:24]}"


def test_a_slug_is_minted_once() -> None:
    """A known name keeps its slug and nothing is written for it."""
    known = mint_slugs(Countries(), ["Armenia", "Brasil"])
    assert mint_slugs(known, ["Brasil"]) is known
    assert mint_slugs(known, ["Chile"]).slugs["Brasil"] == "brasil"
    assert mint_slugs(known, ["BRASIL "]).slugs["BRASIL "] == "brasil"


def test_a_long_name_has_a_short_slug() -> None:
    """A name of 10,000 characters has a slug that a key can hold."""
    assert len(slug_of("ä" * 10_000)) <= 80
    two = mint_slugs(Countries(), ["x" * 10_000, "x" * 10_001]).slugs
    assert len(set(two.values())) == 2
    assert max(map(len, two.values())) <= SLUG_LENGTH_MAX


@given(st.lists(st.text(min_size=1, max_size=100), max_size=8), st.lists(st.text(min_size=1, max_size=100), max_size=8))
def test_each_name_has_its_own_slug(before: list[str], names: list[str]) -> None:
    """Every name has a valid slug of its own, which later names do not change."""
    known = mint_slugs(Countries(), before)
    minted = mint_slugs(known, names)
    assert set(minted.slugs) == {*before, *names}
    comparable = {unicodedata.normalize("NFC", name.strip().casefold()) for name in minted.slugs}
    assert len(set(minted.slugs.values())) == len(comparable)
    assert {name: minted.slugs[name] for name in before} == known.slugs
    for slug in minted.slugs.values():
        msgspec.convert(slug, CountryField)
    assert minted == mint_slugs(known, reversed(names))
