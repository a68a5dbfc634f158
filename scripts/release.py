"""Check a release that `make release` has built, and write its notes.

    python -m scripts.release DIST [TAG]

Both wheels, of the application and of the Python client, must have the version of pyproject.toml and no other top-level
packages than their own. A TAG must name this version. CHANGELOG.md must then have a dated section for it, which becomes
DIST/notes.md.
"""

from __future__ import annotations

import re
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"tripfold": {"services", "shared", "tripfold"}, "tripfold_client": {"tripfold_client"}}
"""The top-level packages of each wheel."""


class InvalidRelease(Exception):
    """The release cannot be published. The message says what differs."""


def main(dist: str, tag: str = "") -> None:
    """Check the release in a folder; exit with 1 and the reason if it is invalid."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    try:
        check_wheels(Path(dist), version)
        if tag:
            notes = notes_of(tag, version, (ROOT / "CHANGELOG.md").read_text())
            Path(dist, "notes.md").write_text(notes)
    except InvalidRelease as error:
        sys.exit(f"release: {error}")
    print(f"Tripfold {version} in {dist} is complete.")


def check_wheels(dist: Path, version: str) -> None:
    """Check the names and the top-level folders of the wheels. Raises InvalidRelease."""
    wheels = sorted(path.name for path in dist.glob("*.whl"))
    expected = {f"{name}-{version}": packages for name, packages in PACKAGES.items()}
    names = sorted(f"{name}-py3-none-any.whl" for name in expected)
    if wheels != names:
        raise InvalidRelease(f"{dist} has the wheels {wheels}; it must have {names} alone")
    for name, packages in expected.items():
        with zipfile.ZipFile(dist / f"{name}-py3-none-any.whl") as wheel:
            found = {path.partition("/")[0] for path in wheel.namelist()}
        if found != packages | {f"{name}.dist-info"}:
            raise InvalidRelease(f"the wheel {name} has the folders {sorted(found)}; it must have {sorted(packages)}")


def notes_of(tag: str, version: str, changelog: str) -> str:
    """Return the section of a version. Raises InvalidRelease if the tag or the date of the section is wrong."""
    if tag != f"v{version}":
        raise InvalidRelease(f"the tag is {tag}; pyproject.toml has version {version}, so it must be v{version}")
    section = re.search(rf"^## \[{re.escape(version)}\] - (\S+)\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None:
        raise InvalidRelease(f"CHANGELOG.md has no section [{version}]")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", section[1]):
        raise InvalidRelease(f"CHANGELOG.md dates [{version}] {section[1]}; write the day of the release")
    return section[2].strip() + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
