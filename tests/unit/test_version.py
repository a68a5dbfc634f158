"""The version of Tripfold is the same wherever a user finds it."""

from __future__ import annotations

import re
import tomllib

from typer.testing import CliRunner

from services.api.documentation.openapi import openapi_config
from tests import ROOT
from tests.fakes.metrics import REGISTRY
from tripfold import cli

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]


def test_the_command_prints_the_version() -> None:
    """``tripfold --version`` prints the version of the package."""
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"tripfold {VERSION}\n")


def test_the_openapi_document_has_the_version() -> None:
    """The OpenAPI document has the version of the package."""
    assert openapi_config().version == VERSION


def test_the_metrics_have_the_version() -> None:
    """The metric of the build has the version of the package as its label."""
    assert REGISTRY.get_sample_value("tripfold_build_info", {"version": VERSION}) == 1


def test_the_python_client_has_the_version() -> None:
    """The Python client is released with the application: both have one version, and the commands need this one."""
    client = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert client["version"] == VERSION
    assert f"tripfold-client=={VERSION}" in PROJECT["dependencies"]


def test_the_changelog_describes_the_version() -> None:
    """The latest version of the changelog is that of the package."""
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == VERSION
