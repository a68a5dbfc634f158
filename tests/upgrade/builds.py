"""The builds that run side by side: this tree, and this tree with a new statistic.

The build with the new statistic is a copy of the sources, changed as docs/how-to/add-a-statistic.md says. It has a
field with a default, its sum, and higher versions of rules and schema.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from shared.runtime.settings import Settings
from tests import ROOT
from tests.integration.running import environment_of

PACKAGES = ("services", "shared", "tripfold")
CHANGES = [
    (
        "services/ingest/parsing/trips.py",
        "    return RULE_VERSION\n",
        "    return RULE_VERSION if written_version() >= 2 else 1\n",
    ),
    (
        "services/ingest/parsing/trips.py",
        "from shared.domain.contribution import round_half_even\n",
        "from shared.domain.contribution import round_half_even\nfrom shared.domain.schema import written_version\n",
    ),
    (
        "shared/domain/contribution.py",
        "    delay_total_ms: Annotated[int, msgspec.Meta(ge=-FIGURE_MAX, le=FIGURE_MAX)]\n",
        (
            "    delay_total_ms: Annotated[int, msgspec.Meta(ge=-FIGURE_MAX, le=FIGURE_MAX)]\n"
            "    late_trips: Annotated[int, msgspec.Meta(ge=0, le=FIGURE_MAX)] = 0\n"
        ),
    ),
    (
        "services/ingest/parsing/totals.py",
        "        self._accidents = 0\n",
        "        self._accidents = self._late_trips = 0\n",
    ),
    (
        "services/ingest/parsing/totals.py",
        "        self._delay_total_ms += delay\n",
        "        self._delay_total_ms += delay\n        self._late_trips += delay > 0\n",
    ),
    (
        "services/ingest/parsing/totals.py",
        "        self.trips += len(trips)\n",
        "        self.trips += len(trips)\n        self._late_trips += sum(self._delays[a.delay] > 0 for a in trips)\n",
    ),
    (
        "services/ingest/parsing/totals.py",
        "            delay_total_ms=self._delay_total_ms,\n",
        (
            "            delay_total_ms=self._delay_total_ms,\n"
            "            late_trips=self._late_trips if self.rule_version >= 2 else 0,\n"
        ),
    ),
]
VERSIONS = [
    ("services/ingest/parsing/trips.py", r"^RULE_VERSION: Final = (\d+)$"),
    ("shared/domain/schema.py", r"^SCHEMA_VERSION = (\d+)$"),
]


def newer_build(folder: Path) -> Path:
    """Copy the sources into a folder, with the new statistic."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, after in CHANGES:
        source = (folder / name).read_text()
        assert source.count(before) == 1, f"{name} has changed: {before!r}"
        (folder / name).write_text(source.replace(before, after))
    for name, pattern in VERSIONS:
        source, replaced = re.subn(
            pattern,
            lambda match: match[0].replace(match[1], str(int(match[1]) + 1)),
            (folder / name).read_text(),
            flags=re.MULTILINE,
        )
        assert replaced == 1, f"{name} has changed: {pattern}"
        (folder / name).write_text(source)
    return folder


async def run_json(build: Path, settings: Settings, *arguments: str) -> dict[str, Any]:
    """Run a command of a build with --json; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tripfold", *arguments, "--json"),
        cwd=build,
        env=environment_of(settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (arguments, out, err)
    printed: dict[str, Any] = json.loads(out)
    return printed
