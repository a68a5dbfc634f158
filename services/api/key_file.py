"""Replaces the API keys when their file changes, without a restart.

The service reads the file every few seconds and compares its keys. So it also notices a link that points to another
file, which is how Kubernetes replaces a secret. Keys take effect once two readings in a row agree: a file that is being
written is not used. A file that cannot be read, or has an invalid line, changes nothing: the service keeps the last
valid keys. A file that every user of the machine may read or change is used, with a warning.
"""

from __future__ import annotations

import asyncio

import structlog

from services.api.auth import Access, ApiKey, InvalidAccessSettings, key_file_is_exposed, read_keys
from shared.runtime import metrics
from shared.runtime.settings import Settings

READ_INTERVAL_S = 2.0

_log = structlog.get_logger()


class KeyFile:
    """The file of API keys that the settings name, and the access control that uses its keys."""

    def __init__(self, settings: Settings, access: Access) -> None:
        self._settings = settings
        self._access = access
        self._latest = access.keys
        self._fault = ""
        self._exposed = False

    async def watch(self) -> None:
        """Read the file every READ_INTERVAL_S, without end. Return at once if the settings name none."""
        while self._settings.api_keys_file:
            await self.read()
            await asyncio.sleep(READ_INTERVAL_S)

    async def read(self) -> None:
        """Read the file once, and use its keys if they differ from the keys in use and agree with the last reading."""
        before, self._exposed = self._exposed, await asyncio.to_thread(key_file_is_exposed, self._settings)
        if self._exposed and not before:
            path = self._settings.api_keys_file
            _log.warning("api_keys_file_exposed", path=path, remedy=f"chmod o= {path}")
        try:
            keys = await asyncio.to_thread(read_keys, self._settings)
        except InvalidAccessSettings as error:
            metrics.api_keys_file_valid.set(0)
            if str(error) != self._fault:
                self._fault = str(error)
                _log.error("api_keys_not_reloaded", error=self._fault, keys_in_use=len(self._access.keys))
            return
        metrics.api_keys_file_valid.set(1)
        self._fault = ""
        if keys == self._latest and keys != self._access.keys:
            _log.info("api_keys_reloaded", **_changes(self._access.keys, keys))
            self._access.replace_keys(keys)
        self._latest = keys


def _changes(before: tuple[ApiKey, ...], after: tuple[ApiKey, ...]) -> dict[str, list[str]]:
    """Return the names of the keys that were added, changed and removed."""
    old, new = ({key.name: key for key in keys} for keys in (before, after))
    return {
        "added": sorted(new.keys() - old.keys()),
        "changed": sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
        "removed": sorted(old.keys() - new.keys()),
    }
