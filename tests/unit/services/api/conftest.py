"""The API over the fakes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.api import Client, World


@pytest.fixture(name="world")
def _world() -> World:
    return World()


@pytest.fixture(name="client")
def _client(world: World) -> Iterator[Client]:
    with world.client() as client:
        yield client
