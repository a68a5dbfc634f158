"""The settings and dependencies in docker-compose.yml and the Dockerfile, checked without Docker."""

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
    assert "api" in SERVICES["api"]["environment"]["TRIPFOLD_API_HOSTS"].split(",")
    assert command["profiles"]
    assert not command.keys() & {"build", "depends_on"}


def test_settings_of_the_api_restart_no_other_service() -> None:
    """Only the API gets API keys: setting them in .env leaves the containers of the other services as they are."""
    with_keys = [name for name, one in SERVICES.items() if "TRIPFOLD_API_KEYS" in (one.get("environment") or {})]
    assert with_keys == ["api"]


def test_only_services_have_the_health_check_of_the_image() -> None:
    """It asks for the readiness of a service. A container that runs another program would fail `up --wait`."""
    own = {name: one for name, one in SERVICES.items() if one["image"] == "tripfold"}
    services = {name for name, one in own.items() if str(one.get("command")).startswith("serve ")}
    assert {name for name, one in own.items() if "healthcheck" not in one} == services


def test_the_profile_observe_mounts_files_that_exist_from_pinned_images() -> None:
    """Without the profile nothing is added; with it each image has a version and each mounted file exists."""
    observers = {name: one for name, one in SERVICES.items() if one.get("profiles") == ["observe"]}
    assert observers.pop("verify")["image"] == SERVICES["worker"]["image"]
    assert observers.keys() == {"prometheus", "alertmanager", "grafana"}
    for one in observers.values():
        assert re.fullmatch(r"\$\{\w+:-[\w/-]+:v?\d+\.\d+\.\d+\}", one["image"])
        mounted = [volume.partition(":")[0] for volume in one["volumes"] if volume.startswith("./")]
        assert mounted
        assert all((ROOT / path).exists() for path in mounted)


def test_prometheus_scrapes_each_service_where_it_listens() -> None:
    """Each service of Tripfold is scraped under its name, on its port."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    scraped = {job["job_name"]: job["dns_sd_configs"][0] for job in config["scrape_configs"] if "dns_sd_configs" in job}
    settings = load_settings({})
    listening = {
        name: settings.api_port if name == "api" else settings.health_port
        for name, one in SERVICES.items()
        if str(one.get("command")).startswith("serve ")
    }
    assert {name: job["port"] for name, job in scraped.items()} == listening
    assert all(job["names"] == [name] for name, job in scraped.items())


def test_services_in_the_image_listen_on_all_addresses() -> None:
    """The image sets both listen addresses, so `docker run --publish` reaches a service without more settings."""
    settings = load_settings(dict(re.findall(r"(TRIPFOLD_\w+)=(\S+)", (ROOT / "Dockerfile").read_text())))
    assert (settings.api_host, settings.health_host) == ("0.0.0.0", "0.0.0.0")
