"""The Python client as its users install it: its wheel in a bare environment, beside nothing of the application."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.fakes.api import World, planned, stats
from tests.serving import served

PACKAGES_MAX = 10
"""The most packages that the client may add to an environment, itself included."""

PROGRAM = """
import importlib.util, sys
from tripfold_client import MissingDependency, Tripfold, WaitTimeout, __version__

api = Tripfold(sys.argv[1])
job = api.process("2024-05-01", "2024-05-03")
try:
    job.wait(timeout=0.1, progress=True)
except WaitTimeout:
    job.cancel()
(day,) = api.stats("2024-05-01", "2024-05-01", country="armenia")
try:
    api.stats("2024-05-01", "2024-05-01").df()
except MissingDependency as error:
    print(error)
print(__version__, job.status, day.bus_count, day.complete)
print([name for name in ("tripfold", "services", "shared") if importlib.util.find_spec(name)])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment without packages; return its interpreter."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", str(folder))
    return folder / "bin" / "python"


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a program; return what it printed."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def packages(python: Path) -> set[str]:
    """Return the packages of an environment."""
    listed = json.loads(run(str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"))
    return {one["name"] for one in listed}


def test_the_wheel_alone_is_small_and_works(environment: Path, tmp_path: Path) -> None:
    """The wheel adds at most ten packages, and talks to the API. Nothing of the application is there."""
    wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path))
    run(*wheel, str(ROOT / "client"))
    (built,) = tmp_path.glob("tripfold_client-*.whl")
    before = packages(environment)
    run(str(environment), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(built))
    added = packages(environment) - before
    assert "tripfold-client" in added or "tripfold_client" in added
    assert len(added) <= PACKAGES_MAX, added

    world = World()
    world.fold_in(stats("armenia"), planned("armenia", city_ids=["7"]))
    with served(world) as url:
        *_, remedy, line, beside = run(str(environment), "-c", PROGRAM, url, cwd=tmp_path).splitlines()
    assert "pip install 'tripfold-client[pandas]'" in remedy
    assert line.split()[1:] == ["cancelled", "8", "True"]
    assert beside == "[]"
