"""The command gc beside a running ingest, on a real store.

The fault model: workers race for the same city-days, so that they write many raw objects and lose most races. gc runs
again and again meanwhile, with the shortest age that it accepts. Each object that a manifest names, now or in its
history, exists at every moment.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from concurrent.futures import ThreadPoolExecutor

from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.retry import UpstreamRetryPolicy
from services.ingest.worker.city_day import CityDayIngest
from shared.domain import keys, objects
from shared.domain.events import IngestCity
from shared.domain.ids import CityId, CountrySlug, mint_request_id, utc_now
from shared.domain.objects import Manifest
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from shared.runtime.settings import Settings
from shared.storage.s3 import S3Store
from tests.fakes.bucket import DAY, trips
from tests.fakes.builders import trip_file
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.upstream import MemoryUpstream
from tests.integration.running import eventually
from tripfold.operate.gc import Verdict, collect_garbage

CITIES = ("1", "2")
WORKERS = 3
SWAP_PAUSE_S = 0.7
DEADLINE_S = 1.0
AGE = dt.timedelta(seconds=3)  # a store writes times in whole seconds
ORPHANS_MIN = 5


class SlowStore(S3Store):
    """A store whose manifests take their time, so that their raw objects lie there unnamed."""

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        if key.startswith(keys.MANIFESTS):
            await asyncio.sleep(random.uniform(0, SWAP_PAUSE_S))
        return await super().compare_and_swap(key, body, etag=etag)


class Ingest:
    """Workers that ingest the same cities at the same time, each file other than the one before, until stopped."""

    def __init__(self, store: S3Store, threads: ThreadPoolExecutor) -> None:
        self._store = store
        self._threads = threads
        self.stopping = asyncio.Event()
        self._rounds = 0
        self._upstream = MemoryUpstream(etags=False)

    async def run(self) -> None:
        """Ingest round after round: in each, every worker gets every city."""
        workers = [self._worker() for _ in range(WORKERS)]
        while not self.stopping.is_set():
            self._rounds += 1
            self._upstream.files = dict.fromkeys(CITIES, trip_file(trips(1, passengers=self._rounds), DAY))
            asked = [(worker, city) for worker in workers for city in CITIES]
            await asyncio.gather(*(worker.run(self._task(city)) for worker, city in asked))

    def _worker(self) -> CityDayIngest:
        retrier = Retrier(health=Health(), wait_max_s=1)
        return CityDayIngest(
            self._store,
            MemoryPublisher(MemoryLog()),
            self._upstream,
            clock=utc_now,
            retry_policy=UpstreamRetryPolicy(CircuitBreaker(retrier), attempts_max=5, outage_limit_s=60),
            threads=self._threads,
            streams=len(CITIES),
            deadline_s=DEADLINE_S,
        )

    def _task(self, city: str) -> IngestCity:
        return IngestCity(
            request_id=mint_request_id(utc_now()),
            date=DAY,
            city_id=CityId(city),
            upstream_id=city,
            city_name=f"City {city}",
            country=CountrySlug("armenia"),
            country_name="Armenia",
            plan_revision=1,
            position=0,
        )


async def missing(store: S3Store) -> list[str]:
    """Return what manifests name and the bucket does not have; the manifests are read first."""
    named: set[str] = set()
    for city in CITIES:
        found = await store.get(keys.manifest(DAY, CityId(city)))
        if found is not None:
            manifest = objects.decode(Manifest, found.body, "a manifest")
            named |= {manifest.raw_key, *(past.raw_key for past in manifest.history)}
    present = {listed.key async for listed in store.list(keys.raw_of(DAY))}
    return sorted(named - present)


async def test_gc_keeps_objects_of_a_running_ingest(settings: Settings) -> None:
    """The command gc deletes objects that lost a race of workers, and never one that a manifest names."""
    deleted: list[str] = []
    async with SlowStore(settings) as store:
        await store.create_bucket()
        with ThreadPoolExecutor(4) as threads:
            ingest = Ingest(store, threads)
            ingesting = asyncio.create_task(ingest.run())

            async def clean_once() -> bool | None:
                async for swept in collect_garbage(store, older_than=AGE, deadline_s=DEADLINE_S, dry_run=False):
                    assert swept.verdict is Verdict.UNNAMED_RAW
                    deleted.append(swept.key)
                assert await missing(store) == []
                return True if len(deleted) >= ORPHANS_MIN else None

            try:
                await eventually(clean_once, "enough orphans to be cleaned up", deadline_s=180)
            finally:
                ingest.stopping.set()
                await ingesting
        assert await missing(store) == []
