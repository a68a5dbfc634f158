"""Backfills over the fakes: planners that advance them, and services that process each request in one step."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Collection, Mapping

import msgspec

from shared.domain import events, keys, objects
from shared.domain.backfills import date_at, dates_total, request_id_of, retried
from shared.domain.events import Outcome, ProcessRequested
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import Plan, PlannedCity, PlannedCountry, RequestRecord
from shared.domain.requests import new_record, status_of
from shared.domain.topics import Topic
from tests.fakes.faults import Break
from tests.fakes.store import MemoryStore
from tests.fault.scenarios import breaks_of
from tests.fault.world import World

STEPS_MAX = 60
UNREADABLE = b"{"


class JobsWorld(World):
    """A bucket and a log with backfills. A request whose date is in ``failing`` fails at its first attempt."""

    def __init__(self, broken: Mapping[int, Break] | None = None, *, failing: Collection[dt.date] = ()) -> None:
        super().__init__(broken)
        self._failing = frozenset(failing)
        self._handled = 0

    def process(self) -> None:
        """End every request that was published since the last call. A retry succeeds."""
        records = self.log.records(Topic.PROCESS_REQUESTS)
        appended = sorted(records, key=self.log.appended.index)
        for record in appended[self._handled :]:
            event = events.decode(record.topic, record.value)
            assert isinstance(event, ProcessRequested)
            key = keys.request(event.request_id)
            stored = self.store.objects.get(key)
            before = (
                objects.decode(RequestRecord, stored.body, key)
                if stored
                else new_record(event.request_id, event.date, self.clock())
            )
            if not status_of(before).ended:
                self.store.write(key, objects.encode(self._ended(before)))
        self._handled = len(appended)

    def _ended(self, record: RequestRecord) -> RequestRecord:
        record = msgspec.structs.replace(record, updated_at=self.clock(), version=record.version + 1)
        if record.cancelled_at is not None:
            return msgspec.structs.replace(record, failed_reason="it was cancelled")
        failed = record.date in self._failing and record.retry is None
        outcomes = {Outcome.FAILED: "1"} if failed else {}
        return msgspec.structs.replace(
            record, planned=True, plan_revision=7, cities=1, outcomes=outcomes, served="0" if failed else "1"
        )

    def write_complete(self, date: dt.date, *, lacking: int = 0) -> None:
        """Write a plan of two cities and the keys of their manifests, but for the ``lacking`` last ones."""
        cities = tuple(PlannedCity(city_id=CityId(name), upstream_id=name, name=name) for name in ("1", "2"))
        plan = Plan(
            date=date,
            revision=1,
            request_id=RequestId("018f38bf-1d00-7000-8000-000000000001"),
            planned_at=self.clock(),
            countries={CountrySlug("armenia"): PlannedCountry(name="Armenia", cities=cities)},
        )
        MemoryStore.write(self.store, keys.plan(date), objects.encode(plan))
        for city in cities[: len(cities) - lacking]:
            MemoryStore.write(self.store, keys.manifest(date, city.city_id), b"{}")

    def requests_by_date(self) -> dict[dt.date, set[RequestId]]:
        """Return the ids under which each date was published."""
        found: dict[dt.date, set[RequestId]] = {}
        for record in self.log.records(Topic.PROCESS_REQUESTS):
            event = events.decode(record.topic, record.value)
            assert isinstance(event, ProcessRequested)
            found.setdefault(event.date, set()).add(event.request_id)
        return found

    def too_many(self, backfill_id: RequestId) -> list[str]:
        """Name the dates that run at the same time beyond the limit."""
        backfill = self.backfill(backfill_id)
        found = self.store.bodies(keys.REQUESTS).items()
        records = [objects.decode(RequestRecord, body, key) for key, body in found if body != UNREADABLE]
        running = [str(record.date) for record in records if not status_of(record).ended]
        return [f"{running} run at once"] if len(running) > backfill.max_parallel else []

    async def finish(self, backfill_id: RequestId) -> list[str]:
        """Let planners and services work until the backfill is closed; name what was wrong on the way."""
        wrong: list[str] = []
        for _ in range(STEPS_MAX):
            await self.advance_jobs()
            wrong += self.too_many(backfill_id)
            self.process()
            self.clock.advance(60)
            if backfill_id not in self.open_backfills:
                return wrong
        return [*wrong, f"after {STEPS_MAX} steps: {self.backfill(backfill_id)}"]

    def wrong_at_end(self, backfill_id: RequestId) -> list[str]:
        """Name each date without exactly its own request, and what else the state of an ended backfill lacks."""
        backfill = self.backfill(backfill_id)
        dates = [date_at(backfill, position) for position in range(dates_total(backfill))]
        expected = {date: {request_id_of(backfill, date)} for date in dates}
        found = self.requests_by_date()
        wrong = [] if found == expected else [f"expected {expected}, found {found}"]
        if not backfill.status.ended or backfill.completed != f"{(1 << len(dates)) - 1:x}":
            wrong.append(f"it has not completed every date: {backfill}")
        return wrong


async def broken_anywhere(first: dt.date, last: dt.date, *, failing: Collection[dt.date] = ()) -> AsyncIterator[str]:
    """Break each call of the planners in each way while a backfill runs and failed dates are retried."""

    async def run(broken: Mapping[int, Break]) -> tuple[JobsWorld, list[str]]:
        world = JobsWorld(broken, failing=failing)
        backfill_id = world.open_backfill(first, last)
        wrong = await world.finish(backfill_id)
        if failing:
            world.change_backfill(backfill_id, retried)
            wrong += await world.finish(backfill_id)
        return world, [*wrong, *world.wrong_at_end(backfill_id), *world.unexpected]

    calm, wrong = await run({})
    for one in wrong:
        yield f"without a fault: {one}"
    made = list(calm.port_calls.made)
    for number, how in breaks_of(made):
        _, wrong = await run({number: how})
        for one in wrong:
            yield f"call {number} ({made[number].what}), {how.value}: {one}"
