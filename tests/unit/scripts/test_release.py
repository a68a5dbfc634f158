"""The check of a release."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from scripts.release import InvalidRelease, check_wheels, notes_of

CHANGELOG = "# Changelog\n\n## [2.0.0] - 2024-05-02\n\n- new\n\n## [1.0.0] - Unreleased\n\n- old\n"


def write_wheel(folder: Path, name: str, *packages: str) -> None:
    """Write a wheel of version 2.0.0 with top-level packages."""
    with zipfile.ZipFile(folder / f"{name}-2.0.0-py3-none-any.whl", "w") as wheel:
        for package in (*packages, f"{name}-2.0.0.dist-info"):
            wheel.writestr(f"{package}/file", "")


def test_notes_are_the_section_of_the_version() -> None:
    """Notes are what the changelog says of the version, without the other versions."""
    assert notes_of("v2.0.0", "2.0.0", CHANGELOG) == "- new\n"


@pytest.mark.parametrize(
    ("tag", "version", "reason"),
    [
        ("v2.0.1", "2.0.0", "it must be v2.0.0"),
        ("v3.0.0", "3.0.0", r"has no section \[3.0.0\]"),
        ("v1.0.0", "1.0.0", "Unreleased; write the day"),
    ],
)
def test_a_tag_needs_its_version_and_a_dated_section(tag: str, version: str, reason: str) -> None:
    """A tag of another version, or without a dated section in the changelog, is refused."""
    with pytest.raises(InvalidRelease, match=reason):
        notes_of(tag, version, CHANGELOG)


def test_each_wheel_has_its_own_packages_alone(tmp_path: Path) -> None:
    """A missing wheel, one of another version, or one with a package that is not its own is refused."""
    write_wheel(tmp_path, "tripfold", "services", "shared", "tripfold")
    with pytest.raises(InvalidRelease, match=r"must have .*tripfold_client-2\.0\.0"):
        check_wheels(tmp_path, "2.0.0")
    write_wheel(tmp_path, "tripfold_client", "tripfold_client")
    check_wheels(tmp_path, "2.0.0")
    with pytest.raises(InvalidRelease, match=r"must have .*tripfold-2\.0\.1"):
        check_wheels(tmp_path, "2.0.1")
    write_wheel(tmp_path, "tripfold_client", "tripfold_client", "shared")
    with pytest.raises(InvalidRelease, match="'shared'"):
        check_wheels(tmp_path, "2.0.0")
