"""Checks that hold after every step of a world."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from services.api.http.date_range import DateRange
from services.api.statistics.reader import SummaryReader
from shared.domain import bitmap
from shared.domain.contribution import Contribution
from shared.domain.events import CityFinished, CountryDaySummary, Outcome
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import Summary
from shared.domain.topics import Topic
from tests.fault import checks
from tests.fault.world import DATE, World


class Watcher:
    """Remembers the earlier states of a world, and checks the next ones against them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._revisions: dict[tuple[CountrySlug, CityId], int] = {}
        self._versions: dict[CountrySlug, int] = {}
        self._manifests: dict[CityId, int] = {}
        self._plan_revision = 0
        self._said: set[tuple[CityId, CountrySlug, int, Contribution | None]] = set()
        self._seen_manifests = self._seen_plans = self._seen_records = 0
        self._summaries: dict[tuple[CountrySlug, int, Contribution], Summary] = {}
        self._seen_summaries = 0
        for summary in checks.live_summaries(world):
            self._note_summary(summary)
        self._published: dict[CountrySlug, int] = {}
        self._finished: dict[tuple[RequestId, int], dict[int, list[CityFinished]]] = {}
        self._served: dict[tuple[RequestId, int], int] = {}
        self._excused: set[RequestId] = set()
        clock = world.clock
        self._reader = SummaryReader(world.store, cache_bytes=100_000, clock_s=lambda: clock().timestamp())

    async def look(self) -> None:
        """Assert all rules that hold after every step."""
        self._take_note()
        live = checks.live_summaries(self._world)
        for summary in live:
            self._of_summary(summary)
        missing = set(self._versions) - {summary.country for summary in live}
        assert not missing, f"the summaries of {missing} are gone"
        self._raw_objects_are_there()
        lost = self._world.store.lost_reports
        assert not lost, f"gc took {lost} away, although their files were refused again"
        served = await self._read()
        self._counted_as_served_is_served(served)
        for country, version in self._published.items():
            read = served[country].version if country in served else 0
            assert read >= version, f"version {version} of {country} is published, and a reader sees {read}"

    async def look_at_rest(self) -> None:
        """Assert also that a reader sees every summary as it is stored: each change has been counted."""
        await self.look()
        read = {country: summary.version for country, summary in (await self._read()).items()}
        stored = {summary.country: summary.version for summary in checks.live_summaries(self._world)}
        assert read == stored, f"a reader sees {read}, and live is {stored}"

    def lose(self, country: CountrySlug) -> None:
        """Forget a summary that somebody deleted, and what the requests so far say about it."""
        self._versions.pop(country, None)
        self._published.pop(country, None)
        self._revisions = {place: one for place, one in self._revisions.items() if place[0] != country}
        self._excused |= {record.request_id for record in checks.requests(self._world)}

    async def complaints(self, *, at_rest: bool = False) -> list[str]:
        """Look, and return what is wrong instead of raising it."""
        try:
            await (self.look_at_rest if at_rest else self.look)()
        except AssertionError as error:
            return [str(error)]
        return []

    async def _read(self) -> dict[CountrySlug, Summary]:
        """Return the summaries that a reader sees; it has read before, and keeps its listings."""
        heads = (await self._reader.read(DateRange(DATE, DATE))).heads
        unknown = [head for head in heads if (head.country, head.version, head.totals) not in self._summaries]
        assert not unknown, f"{unknown} are served, and never were stored"
        return {head.country: self._summaries[head.country, head.version, head.totals] for head in heads}

    def _note_summary(self, summary: Summary) -> None:
        self._summaries[summary.country, summary.version, summary.totals] = summary

    def _take_note(self) -> None:
        store = self._world.store
        for manifest in store.manifests[self._seen_manifests :]:
            before = self._manifests.get(manifest.city_id, 0)
            assert manifest.revision > before, f"city {manifest.city_id}: {manifest.revision} after {before}"
            self._manifests[manifest.city_id] = manifest.revision
            self._said.add((manifest.city_id, manifest.country, manifest.revision, manifest.contribution))
            for country, revision in manifest.retracted.items():
                self._said.add((manifest.city_id, country, revision, None))
        self._seen_manifests = len(store.manifests)
        for plan in store.plans[self._seen_plans :]:
            assert plan.revision > self._plan_revision, f"plan {plan.revision} after {self._plan_revision}"
            self._plan_revision = plan.revision
        self._seen_plans = len(store.plans)
        for summary in store.summaries[self._seen_summaries :]:
            self._note_summary(summary)
        self._seen_summaries = len(store.summaries)
        for record in self._world.log.appended[self._seen_records :]:
            if record.topic is Topic.COUNTRY_DAY_SUMMARIES:
                published = checks.event_of(record)
                if isinstance(published, CountryDaySummary):
                    known = self._published.get(published.country, 0)
                    self._published[published.country] = max(known, published.version)
            if record.topic is Topic.REQUEST_PROGRESS:
                event = checks.event_of(record)
                if isinstance(event, CityFinished) and event.outcome is not Outcome.FAILED:
                    of_plan = self._finished.setdefault((event.request_id, event.plan_revision), {})
                    of_plan.setdefault(event.position, []).append(event)
        self._seen_records = len(self._world.log.appended)

    def _of_summary(self, summary: Summary) -> None:
        country = summary.country
        current = {}
        for city_id, entry in summary.ledger.items():
            said = (city_id, country, entry.revision, entry.contribution)
            assert said in self._said, f"{said} is served, and no manifest ever said so"
            before = self._revisions.get((country, city_id), 0)
            assert entry.revision >= before, f"{country}/{city_id}: revision {entry.revision} after {before}"
            self._revisions[country, city_id] = entry.revision
            if entry.contribution is not None:
                current[city_id] = entry.contribution
        gone = [city for (where, city) in self._revisions if where == country and city not in summary.ledger]
        assert not gone, f"{country} knows nothing of {gone} any more"
        sums = [sum(column) for column in zip(*map(msgspec.structs.astuple, current.values()), strict=True)]
        assert list(msgspec.structs.astuple(summary.totals)) == (sums or [0, 0, 0, 0]), f"totals of {country}"
        version = summary.plan_revision + sum(entry.revision for entry in summary.ledger.values())
        assert summary.version == version, f"version of {country}"
        assert summary.complete == (summary.plan_revision > 0 and summary.expected_cities <= set(current))
        before = self._versions.get(country, 0)
        assert summary.version >= before, f"{country}: version {summary.version} after {before}"
        self._versions[country] = summary.version

    def _raw_objects_are_there(self) -> None:
        early = self._world.store.early_manifests
        assert not early, f"{early} were written before their raw objects"
        for manifest in checks.manifests(self._world):
            needed = manifest.raw_keys - manifest.expired_raw_keys()
            lost = [key for key in needed if key not in self._world.store.objects]
            assert not lost, f"{lost} are named by the manifest of city {manifest.city_id}, and are not there"

    def _counted_as_served_is_served(self, read: Mapping[CountrySlug, Summary]) -> None:
        for record in checks.requests(self._world):
            if record.request_id in self._excused:
                continue
            planned = (record.request_id, record.plan_revision)
            before = self._served.get(planned, 0)
            self._served[planned] = before | bitmap.decode(record.served)
            for position, finished in self._finished.get(planned, {}).items():
                # A served city stays served: a revision that a repeated task stores later, of a corrected file, is on
                # its way (docs/explanation/limits.md). So one of its ends is enough.
                if not bitmap.contains(before, position) and bitmap.contains(self._served[planned], position):
                    assert any(_is_served(event, read) for event in finished), (
                        f"city {finished[0].city_id} counts as served for {record.request_id}, and is not"
                    )


def _is_served(finished: CityFinished, read: Mapping[CountrySlug, Summary]) -> bool:
    """Return whether all revisions of a finished city are in the summaries that a reader sees."""
    ledgers = {country: summary.ledger for country, summary in read.items()}
    return bool(finished.published) and all(
        finished.city_id in ledgers.get(pair.country, {})
        and ledgers[pair.country][finished.city_id].revision >= pair.revision
        for pair in finished.published
    )
