"""The settings and dependencies in docker-compose.yml, checked without Docker."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from services.api.auth import access_of, digest_of
from shared.runtime.settings import load_settings
from tests import ROOT

SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
KEY = f"reader:read:{digest_of('sesame')}"


@pytest.mark.parametrize("variables", [{}, {"TRIPFOLD_API_KEYS": KEY}])
def test_the_api_requires_keys_if_some_are_configured(variables: dict[str, str]) -> None:
    """The API in docker-compose.yml is open without keys, and requires keys if the environment has some."""
    environment = SERVICES["api"]["environment"]
    given = {
        name: re.sub(r"\$\{(\w+):-(.*?)\}", lambda found: variables.get(found[1]) or found[2], str(value))
        for name, value in environment.items()
    }
    assert access_of(load_settings(given)).needs_key is bool(variables)


def test_the_command_service_builds_and_starts_nothing() -> None:
    """The service for commands has the settings of the other services, finds the API, and depends on none of them."""
    command = SERVICES["tripfold"]
    own = {"TRIPFOLD_API_URL": "http://api:8080", "TRIPFOLD_API_KEY": "${TRIPFOLD_API_KEY:-}"}
    assert command["environment"] == {**SERVICES["worker"]["environment"], **own}
    assert command["profiles"]
    assert not command.keys() & {"build", "depends_on"}


def test_settings_of_the_api_restart_no_other_service() -> None:
    """Only the API gets API keys: setting them in .env leaves the containers of the other services as they are."""
    with_keys = [name for name, one in SERVICES.items() if "TRIPFOLD_API_KEYS" in (one.get("environment") or {})]
    assert with_keys == ["api"]
