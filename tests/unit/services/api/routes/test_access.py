"""``GET /access``."""

from __future__ import annotations

import pytest

from services.api.auth import KEY_HEADER, digest_of, mint_key
from tests.fakes.api import World


@pytest.mark.parametrize("scopes", ["read", "process", "read+process"])
def test_a_key_tells_its_name_and_scopes(world: World, scopes: str) -> None:
    """Every key may ask what it may do, also one that may only process."""
    key = mint_key()
    keys = f"page:{scopes}:{digest_of(key)}:2027-01-31"
    with world.client(api_access="keys", api_keys=keys) as client:
        response = client.get("/access", headers={KEY_HEADER: key})
        assert client.get("/access").status_code == 401
    assert response.json() == {"key": "page", "scopes": scopes.split("+"), "expires_at": "2027-01-31T00:00:00Z"}


def test_an_open_api_needs_no_key(world: World) -> None:
    """Without keys everybody may read and process."""
    with world.client() as client:
        assert client.get("/access").json() == {"key": None, "scopes": ["read", "process"], "expires_at": None}
