"""Compares a new file with the files of the same weekday in the last eight weeks, whose manifests the bucket has."""

from __future__ import annotations

import datetime as dt

from services.ingest.parsing.parser import InvalidTripFile
from shared.domain import keys
from shared.domain.ids import CityId
from shared.domain.objects import CorruptObject, Manifest
from shared.domain.volume import Volume, VolumeRules, dates_compared, suspicion_of
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

CONCURRENT_GETS_MAX = 8


class SuspiciousFile(InvalidTripFile):
    """The volume of the file is suspicious, and the settings refuse such files."""


class VolumeCheck:
    """Judges the volume of new files. ``rules`` is None if nothing is to be judged."""

    def __init__(self, store: ObjectStore, rules: VolumeRules | None) -> None:
        self._repository = Repository(store)
        self.rules = rules

    async def suspicion_of(self, manifest: Manifest) -> str | None:
        """Return why the volume of a manifest's file is suspicious, or None.

        Earlier days without a readable manifest are left out: what is wrong with them concerns no other day.
        """
        if self.rules is None:
            return None

        async def read(date: dt.date) -> Volume | None:
            return await self._volume_of(date, manifest.city_id)

        found = await bounded_map(read, dates_compared(manifest.date), limit=CONCURRENT_GETS_MAX)
        file = Volume(manifest.contribution.trips, manifest.size_bytes)
        return suspicion_of(manifest.date, file, [one for one in found if one is not None], self.rules)

    async def _volume_of(self, date: dt.date, city_id: CityId) -> Volume | None:
        try:
            manifest = await self._repository.get(Manifest, keys.manifest(date, city_id))
        except CorruptObject:
            return None
        return Volume(manifest.contribution.trips, manifest.size_bytes) if manifest else None
