"""The servers of these tests are those of the integration tests. ``make test-upgrade`` runs them."""

from tests.integration.conftest import embedded, settings

__all__ = ["embedded", "settings"]
