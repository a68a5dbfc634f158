"""Every input that the fuzzer once found interesting still obeys the laws. `make fuzz` looks for more."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import CORPUS
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_obeys_the_laws(name: str) -> None:
    """No input breaks a law, and there are inputs."""
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        TARGETS[name](path.read_bytes())
