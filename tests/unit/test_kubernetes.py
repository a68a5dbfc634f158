"""The manifests in deploy/kubernetes, compared with the code. `make manifests` checks them against Kubernetes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from services.api.server import SHUTDOWN_GRACE_S as API_GRACE_S
from shared.kafka.producer import CLOSE_TIMEOUT_S
from shared.kafka.subscription import SHUTDOWN_GRACE_S as CONSUMER_GRACE_S
from shared.runtime.settings import PREFIX, Settings, load_settings
from shared.service import DISCONNECT_TIMEOUT_S
from tests import ROOT
from tripfold.cli import app

FOLDER = ROOT / "deploy" / "kubernetes"
PROCESSES = ("api", "planner", "worker", "aggregate")


def documents(name: str) -> list[dict[str, Any]]:
    """Return the objects of a manifest."""
    return [one for one in yaml.safe_load_all((FOLDER / name).read_text()) if one]


def of_kind(kind: str) -> list[dict[str, Any]]:
    """Return the objects of a kind in all manifests, without the patches."""
    kustomization = documents("kustomization.yaml")[0]
    return [one for name in kustomization["resources"] for one in documents(name) if one["kind"] == kind]


def container(owner: dict[str, Any]) -> dict[str, Any]:
    """Return the container of a Deployment or CronJob."""
    found = owner["spec"].get("jobTemplate", owner)["spec"]["template"]["spec"]["containers"][0]
    assert isinstance(found, dict)
    return found


def settings_of_manifests() -> dict[str, str]:
    """Return the variables of settings.env."""
    lines = (FOLDER / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_every_variable_is_a_setting_with_a_valid_value() -> None:
    """A name that is no setting would have no effect."""
    given = settings_of_manifests()
    for owner in of_kind("Deployment"):
        given |= {one["name"]: one["value"] for one in container(owner).get("env", [])}
    known = {f"{PREFIX}{field}".upper() for field in Settings.model_fields}
    assert given.keys() <= known
    load_settings(given)


@pytest.mark.parametrize(
    "owner", [*of_kind("Deployment"), *of_kind("CronJob")], ids=lambda one: one["metadata"]["name"]
)
def test_the_arguments_are_a_command(owner: dict[str, Any]) -> None:
    """Each container runs commands of `tripfold` with options that exist."""
    own = container(owner)
    lines = [own["args"]] if "args" in own else [line.split()[1:] for line in own["command"][-1].split(" && ")]
    for arguments in lines:
        result = CliRunner().invoke(app, [*arguments, "--help"])
        assert result.exit_code == 0, result.output
        assert all(option in result.output for option in arguments if option.startswith("--"))


@pytest.mark.parametrize("name", PROCESSES)
def test_probes_reach_the_port_on_which_a_process_listens(name: str) -> None:
    """The port of the container is the default of the setting, and all probes use it."""
    [deployment] = [one for one in documents(f"{name}.yaml") if one["kind"] == "Deployment"]
    own = container(deployment)
    settings = load_settings({})
    [port] = own["ports"]
    assert port["containerPort"] == (settings.api_port if name == "api" else settings.health_port)
    assert deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert own[probe]["httpGet"]["port"] == port["name"]
    assert own["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_a_consumer_keeps_a_partition_for_the_pod_that_replaces_another() -> None:
    """While pods are replaced there is one more of them, and a consumer without a partition is never ready."""
    for deployment in of_kind("Deployment"):
        assert deployment["spec"]["replicas"] < int(settings_of_manifests()["TRIPFOLD_KAFKA_PARTITIONS"])


def test_the_grace_period_exceeds_every_shutdown() -> None:
    """Kubernetes kills no process that still finishes its work."""
    [patch] = documents("process.yaml")
    [api] = [one for one in documents("api.yaml") if one["kind"] == "Deployment"]
    variables = {one["name"]: one["value"] for one in container(api)["env"]}
    waits_s = load_settings(variables).api_shutdown_delay_s
    consumer_s = CONSUMER_GRACE_S + DISCONNECT_TIMEOUT_S + CLOSE_TIMEOUT_S
    longest_s = max(consumer_s, waits_s + API_GRACE_S + CLOSE_TIMEOUT_S)
    assert patch["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > longest_s


def test_no_secret_is_in_a_manifest() -> None:
    """Manifests name Secrets, and hold none."""
    assert of_kind("Secret") == []
    secret = {
        f"{PREFIX}{field}".upper() for field, info in Settings.model_fields.items() if "Secret" in str(info.annotation)
    }
    assert not settings_of_manifests().keys() & (secret | {f"{PREFIX}API_KEYS"})


def test_every_manifest_is_part_of_the_kustomization() -> None:
    """No file of the folder is forgotten."""
    kustomization = documents("kustomization.yaml")[0]
    named = {*kustomization["resources"], *(patch["path"] for patch in kustomization["patches"])}
    assert {path.name for path in FOLDER.glob("*.yaml")} == named | {"kustomization.yaml"}
