"""The check of the documentation finds what it is for."""

from __future__ import annotations

import pytest

from scripts import check_docs
from tests import ROOT

PAGE = ROOT / "docs" / "made-up.md"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("[a](reference/none.md)", "docs/made-up.md: the link reference/none.md leads to no file"),
        ("[a](reference/cli.md#none)", "docs/made-up.md: the link reference/cli.md#none leads to no heading"),
        ("[a](reference/cli.md#use) [b](https://example.com/none) `[c](none.md)`", None),
        ("```\n[a](none.md)\n```", None),
    ],
)
def test_broken_links_are_found(text: str, finding: str | None) -> None:
    """A link leads to a file and to one of its headings; links in code are no links."""
    assert list(check_docs.broken_links({PAGE: text})) == ([finding] if finding else [])


def test_anchors_are_made_as_on_github() -> None:
    """Punctuation goes, spaces become dashes, and a repeated heading gets a number."""
    text = "# Keys: `raw/`, and *more*\n## Fold\n## Fold\n```\n# no heading\n```\n## [Link](x.md) 2"
    assert check_docs.anchors_of(text) == {"keys-raw-and-more", "fold", "fold-1", "link-2"}


def test_pages_unreachable_from_the_readme_are_found() -> None:
    """A page is reached from the README, by way of other pages too."""
    linked, lost = ROOT / "docs" / "linked.md", ROOT / "docs" / "lost.md"
    pages = {check_docs.START: "[a](docs/made-up.md)", PAGE: "[b](linked.md#x)", linked: "", lost: "[c](made-up.md)"}
    assert list(check_docs.unlinked_pages(pages)) == ["docs/lost.md: no link leads here from README.md"]


def test_long_pages_are_found() -> None:
    """A page has at most 2,000 words."""
    assert list(check_docs.long_pages({PAGE: "word " * 2_000})) == []
    assert list(check_docs.long_pages({PAGE: "word " * 2_001})) == [
        "docs/made-up.md: 2,001 words; split it into pages of at most 2,000"
    ]


def test_documented_names_missing_in_the_code_are_found() -> None:
    """A page names only files, settings, metrics and commands that exist."""
    text = (
        "`services/none.py` TRIPFOLD_NONE TRIPFOLD_S3_* TRIPFOLD_API_KEY `tripfold none` `tripfold requests list` "
        "tripfold is a word tripfold_none_total tripfold_batch_seconds_bucket"
    )
    findings = [
        *check_docs.missing_files({PAGE: text}),
        *check_docs.unknown_variables({PAGE: text}),
        *check_docs.unknown_metrics({PAGE: text}),
        *check_docs.unknown_commands({PAGE: text}),
    ]
    assert findings == [
        "docs/made-up.md: there is no file services/none.py",
        "docs/made-up.md: there is no setting TRIPFOLD_NONE",
        "docs/made-up.md: there is no metric tripfold_none_total",
        "docs/made-up.md: there is no command tripfold none",
    ]


def test_undocumented_names_of_the_code_are_found() -> None:
    """A setting without a row in its table is a finding."""
    names = {*check_docs.settings(), "TRIPFOLD_NEW"}
    found = list(check_docs.undescribed("settings.md", "setting", names, rows=r"^\| `(TRIPFOLD_\w+)`"))
    assert found == ["docs/reference/settings.md: the setting TRIPFOLD_NEW is not described"]
