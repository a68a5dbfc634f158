"""The planner: which plan a request gets beside others, what its tasks name, and what the topic ends in."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import pytest
from msgspec import UNSET, UnsetType

from services.api.requests.service import Requests
from services.ingest.planner import planner
from services.ingest.planner.planner import Planner
from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.errors import PermanentUpstreamError, UpstreamDown
from services.ingest.upstream.retry import UpstreamRetryPolicy
from shared.domain import bitmap, events, keys, objects
from shared.domain.events import (
    BACKGROUND,
    Background,
    CountryDayPlanned,
    Event,
    IngestCity,
    ProcessRequested,
    RequestFailed,
    RequestPlanned,
    Retry,
    Source,
)
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import Countries, Plan, RequestRecord
from shared.domain.requests import Status, status_of
from shared.domain.topics import Topic
from shared.kafka.records import OutgoingEvent
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from shared.storage import active_requests
from shared.storage.repository import read_plan, read_request_record
from tests.fakes.bucket import FakeBucket, trips
from tests.fakes.builders import Clock, UpstreamState
from tests.fakes.handling import handle_all
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.metrics import value
from tests.fakes.store import MemoryStore
from tests.fakes.upstream import MemoryUpstream
from tests.fault.checks import record_of, requests
from tests.fault.scenarios import HOME, WHOLE
from tests.fault.world import OUTAGE_LIMIT_S, World

DATE = dt.date(2024, 5, 1)
NOON = dt.datetime(2024, 5, 2, 12, tzinfo=dt.UTC)

Meanwhile = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """Let nothing happen."""


class RacedStore(MemoryStore):
    """A bucket into which somebody else writes once, just before the first swap of a key."""

    raced_key = ""
    meanwhile: Meanwhile = staticmethod(nothing)

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        if key == self.raced_key:
            self.raced_key = ""
            await self.meanwhile()
        return await super().compare_and_swap(key, body, etag=etag)


class RacedPublisher(MemoryPublisher):
    """A publisher beside which something happens once, before the first event of a country."""

    meanwhile: Meanwhile | None = None

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        batch = list(outgoing)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
        await super().publish(batch)


class Planned:
    """A bucket, a log and an upstream, over which any number of planners plan."""

    def __init__(self) -> None:
        self.clock = Clock(NOON)
        self.store = RacedStore(self.clock)
        self.log = MemoryLog()
        self.upstream = MemoryUpstream()
        self.publisher = RacedPublisher(self.log)
        self.allow_no_cities = False
        self._requests = 0

    def lists(self, cities: dict[str, str], *, bad: int = 0) -> None:
        """Let the upstream list cities, by id, with their countries, and so many entries that are none."""
        listed: list[dict[str, int | str]] = [
            {"id": int(city), "name": f"City {city}", "country": country} for city, country in cities.items()
        ]
        self.upstream.city_list = json.dumps([*listed, *[{"id": ""}] * bad]).encode()

    def requested(self, retry: Retry | None = None) -> ProcessRequested:
        """Return a request, or a retry of the one before."""
        self._requests += retry is None
        request_id = RequestId(f"018f38bf-1d00-7000-8000-{self._requests:012x}")
        return ProcessRequested(request_id=request_id, date=DATE, requested_at=NOON, retry=retry)

    async def plan(
        self,
        request: ProcessRequested | None = None,
        publisher: MemoryPublisher | None = None,
        *,
        others: Iterable[ProcessRequested] = (),
    ) -> Plan:
        """Plan a request, and others in the same batch after it; return the plan that the date has then."""
        batch = [request or self.requested(), *others]
        circuit = CircuitBreaker(Retrier(health=Health(), wait_max_s=1))
        retry_policy = UpstreamRetryPolicy(circuit, attempts_max=1, outage_limit_s=1)
        planner = Planner(
            self.store,
            publisher or self.publisher,
            self.upstream,
            clock=self.clock,
            retry_policy=retry_policy,
            allow_no_cities=self.allow_no_cities,
        )
        await handle_all(
            planner.process,
            [
                self.log.append(one.topic, one.key.encode(), events.encode(one), events.headers_of(one, source="api"))
                for one in batch
            ],
        )
        plan = await read_plan(self.store, DATE)
        assert plan is not None
        return plan

    def published(self, topic: Topic) -> list[Event]:
        """Return the events of a topic, in the order in which they were published."""
        return [events.decode(topic, record.value) for record in self.log.appended if record.topic is topic]

    def countries(self) -> dict[str, tuple[int, list[str]]]:
        """Return what compaction leaves of the plan's events: revision and cities, by country."""
        last: dict[str, tuple[int, list[str]]] = {}
        for event in self.published(Topic.CITY_STATS):
            assert isinstance(event, CountryDayPlanned)
            last[event.country] = (event.plan_revision, list(event.city_ids))
        return last


async def test_a_retry_uses_the_plan_that_it_names() -> None:
    """While no later request changed the plan, a retry is for its cities alone, whatever the upstream lists by then."""
    planned = Planned()
    planned.lists({"1": "Peru", "2": "Peru"})
    before = await planned.plan()
    assert await planned.plan() == before  # a request whose plan another one made
    planned.lists({"2": "Chad", "3": "Chad"})
    retried_at = NOON + dt.timedelta(minutes=1)
    retry = Retry(plan_revision=before.revision, positions=bitmap.encode(0b10), retried_at=retried_at)
    assert await planned.plan(planned.requested(retry)) == before
    tasks = [event for event in planned.published(Topic.CITY_TASKS) if isinstance(event, IngestCity)]
    assert [(task.city_id, task.position, task.retried_at) for task in tasks[4:]] == [("2", 1, retried_at)]


async def test_a_planned_request_has_a_task_for_each_city() -> None:
    """The event counts cities, countries and bad entries. A task has all that a worker needs to know of its city."""
    planned = Planned()
    planned.lists({"2": "Peru", "1": "Peru", "3": "Chad"}, bad=1)
    request = planned.requested()
    plan = await planned.plan(request)
    (told,) = planned.published(Topic.REQUEST_PROGRESS)
    assert told == RequestPlanned(
        request_id=request.request_id,
        date=DATE,
        requested_at=NOON,
        plan_revision=plan.revision,
        cities=3,
        countries=2,
        bad_cities_count=1,
        bad_cities=plan.bad_cities,
    )
    assert planned.published(Topic.CITY_TASKS) == [
        IngestCity(
            request_id=request.request_id,
            date=DATE,
            city_id=CityId(city),
            upstream_id=city,
            city_name=f"City {city}",
            country=CountrySlug(country),
            country_name=country.title(),
            plan_revision=plan.revision,
            position=position,
        )
        for position, (city, country) in enumerate([("3", "chad"), ("1", "peru"), ("2", "peru")])
    ]
    assert (plan.request_id, plan.planned_at, plan.write_intent) == (request.request_id, NOON, UNSET)


async def test_a_failed_request_names_itself_and_the_reason() -> None:
    """The event of a request whose list cannot be fetched has its times, and those of a retry."""
    planned = Planned()
    planned.lists({"1": "Peru"})
    await planned.plan()
    planned.upstream.city_list = PermanentUpstreamError("x" * 3_000)
    retried_at = NOON + dt.timedelta(minutes=1)
    retry = Retry(plan_revision=77, positions=bitmap.encode(1), retried_at=retried_at)
    request = msgspec.structs.replace(planned.requested(), retry=retry)
    await planned.plan(request)
    assert planned.published(Topic.REQUEST_PROGRESS)[-1] == RequestFailed(
        request_id=request.request_id,
        date=DATE,
        requested_at=NOON,
        reason="the list of cities cannot be used: ".ljust(2_000, "x"),
        retried_at=retried_at,
    )
    record = await read_request_record(planned.store, request.request_id)
    assert record is not None
    assert record.dispatched_at == retried_at


async def test_an_outage_delays_only_requests_that_need_the_upstream() -> None:
    """A request whose list cannot be fetched waits in a topic: a request of stored files is planned meanwhile."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    waiting = world.request(WHOLE)
    stored = world.request(WHOLE, joining=False, background=Background(source=Source.BUCKET))
    world.upstream.city_list = UpstreamDown("refused")
    while await world.turn("planner"):
        pass
    assert len(world.log.records(Topic.RETRIES)) == 1
    while await world.turn("progress"):
        pass
    assert (record_of(world, waiting).planned, record_of(world, stored).planned) == (False, True)
    WHOLE.write_into(world.upstream, DATE)
    await world.run_to_rest()
    assert status_of(record_of(world, waiting)) is Status.COMPLETED


async def test_an_outage_is_limited_from_the_first_attempt_of_a_request() -> None:
    """The limit counts since the request first found the upstream down, not since its latest attempt."""
    planned = Planned()
    planned.lists({"1": "Peru"})
    await planned.plan()
    planned.upstream.city_list = UpstreamDown("refused")
    await planned.plan(planned.requested())
    for _ in range(2):
        planned.clock.advance(0.5)
        *_, later = planned.published(Topic.RETRIES)
        assert isinstance(later, ProcessRequested)
        assert later.down_since == NOON
        await planned.plan(later)
    failed = planned.published(Topic.REQUEST_PROGRESS)[-1]
    assert isinstance(failed, RequestFailed)
    assert failed.reason == "the list of cities cannot be used: refused (for 1 s)"


async def test_a_request_that_was_requeued_in_an_outage_fails_once() -> None:
    """The second event of a request is dropped after the first has failed the request, though its time is not over."""
    world = World()
    request_id = world.request(WHOLE)
    world.upstream.city_list = UpstreamDown("refused")
    await world.turn("planner")
    await world.requeue()
    await world.turn("planner")
    assert len(world.log.records(Topic.RETRIES)) == 2
    world.clock.advance(OUTAGE_LIMIT_S - 1)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.FAILED


async def test_a_cancelled_request_ends_while_it_waits_for_the_upstream() -> None:
    """A cancellation needs no upstream: the request ends at once, and its next attempt is dropped."""
    world = World()
    request_id = world.request(WHOLE)
    world.upstream.city_list = UpstreamDown("refused")
    await world.turn("planner")
    requests_api = Requests(world.store, MemoryPublisher(world.log), clock=world.clock)
    await requests_api.cancel(request_id)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.CANCELLED


async def test_stored_files_are_read_again_without_a_plan() -> None:
    """The tasks of a date that has files and no plan name the cities of its manifests, and publish no plan."""
    bucket, planned = FakeBucket(), Planned()
    bucket.store_file(7, 11, trips(1), "chad")
    bucket.store_file(8, 12, trips(1), "peru")
    for key, stored in bucket.store.objects.items():
        planned.store.write(key, stored.body)
    wanted = Background(source=Source.BUCKET, country=CountrySlug("peru"), again=True)
    request = msgspec.structs.replace(planned.requested(), background=wanted)
    with contextlib.suppress(AssertionError):  # there is no plan to return
        await planned.plan(request)
    (told,) = planned.published(Topic.REQUEST_PROGRESS)
    (task,) = planned.published(Topic.BACKGROUND_TASKS)
    assert isinstance(told, RequestPlanned)
    assert isinstance(task, IngestCity)
    assert (told.plan_revision, told.cities, told.countries) == (1, 1, 1)
    assert (task.city_id, task.plan_revision) == ("8", 1)
    assert task.background == Background(source=Source.BUCKET, again=True)
    assert planned.published(Topic.CITY_STATS) == []
    assert await read_plan(planned.store, DATE) is None
    bucket.plan(3, {"peru": [8]})
    planned.store.write(keys.plan(DATE), bucket.store.objects[keys.plan(DATE)].body)
    await planned.plan(msgspec.structs.replace(planned.requested(), background=wanted))
    told = planned.published(Topic.REQUEST_PROGRESS)[-1]
    assert isinstance(told, RequestPlanned)
    assert (told.plan_revision, told.cities, told.countries) == (3, 1, 1)


async def test_requests_of_clients_are_planned_before_those_of_backfills() -> None:
    """An older request of a backfill comes later in its batch; its tasks and record are marked."""
    planned = Planned()
    planned.lists({"1": "Peru"})
    older, client = planned.requested(), planned.requested()
    older = msgspec.structs.replace(older, requested_at=NOON - dt.timedelta(days=1), background=BACKGROUND)
    await planned.plan(older, others=[client])
    ended = [
        event.request_id for event in planned.published(Topic.REQUEST_PROGRESS) if isinstance(event, RequestPlanned)
    ]
    assert ended == [client.request_id, older.request_id]
    for topic, request in ((Topic.CITY_TASKS, client), (Topic.BACKGROUND_TASKS, older)):
        (task,) = planned.published(topic)
        assert isinstance(task, IngestCity)
        record = await read_request_record(planned.store, request.request_id)
        assert record is not None
        assert (task.request_id, record.background) == (request.request_id, request.background)


@pytest.mark.parametrize(("planned_before", "cities"), [(0, ["2"]), (-1, ["1", "2"])])
async def test_a_stalled_request_gets_tasks_for_its_unfinished_cities(planned_before: int, cities: list[str]) -> None:
    """A record of another plan says nothing of the cities of this one, so all get a task."""
    planned = Planned()
    planned.lists({"1": "Peru", "2": "Peru"})
    plan = await planned.plan(request := planned.requested())
    record = await read_request_record(planned.store, request.request_id)
    assert record is not None
    served = msgspec.structs.replace(
        record, planned=True, plan_revision=plan.revision + planned_before, cities=2, served=bitmap.encode(0b01)
    )
    planned.store.write(keys.request(request.request_id), objects.encode(served))
    resent = msgspec.structs.replace(request, resent_at=NOON + dt.timedelta(hours=1))
    await planned.plan(resent)
    tasks = [event.city_id for event in planned.published(Topic.CITY_TASKS)[2:] if isinstance(event, IngestCity)]
    assert tasks == cities
    await planned.plan(resent)  # as it is redelivered
    assert len(planned.published(Topic.CITY_TASKS)) == 2 + len(cities)


@pytest.mark.parametrize(("background", "waits"), [(BACKGROUND, True), (UNSET, False)])
async def test_a_backfill_waits_for_another_of_its_date(background: Background | UnsetType, waits: bool) -> None:
    """While a request of a backfill runs, another one waits. That of a client does not."""
    planned = Planned()
    planned.lists({"1": "Peru"})
    first = msgspec.structs.replace(planned.requested(), background=BACKGROUND)
    second = msgspec.structs.replace(planned.requested(), background=background)
    for request in (first, second):
        await active_requests.join(planned.store, DATE, request.request_id)
        await planned.plan(request)
    told = [event for event in planned.published(Topic.REQUEST_PROGRESS) if isinstance(event, RequestPlanned)]
    assert [event.request_id for event in told] == [one.request_id for one in (first, *(() if waits else (second,)))]


async def test_a_redelivered_request_is_planned_once() -> None:
    """Once all tasks of a request are published, the same event publishes none again, nor reads the city list."""
    planned = Planned()
    planned.lists({"1": "Peru", "2": "Peru"})
    request = planned.requested()
    timed = [value("tripfold_ingest_stage_seconds_count", stage=stage) for stage in ("city_list", "publish_plan")]
    await planned.plan(request)
    planned.lists({"3": "Chad"})
    await planned.plan(request)
    assert len(planned.published(Topic.CITY_TASKS)) == 2
    for before, stage in zip(timed, ("city_list", "publish_plan"), strict=True):
        assert value("tripfold_ingest_stage_seconds_count", stage=stage) == before + 1


async def test_the_topic_ends_with_the_newest_plan_after_a_race() -> None:
    """A planner that is overtaken between its swap and its events publishes the newer plan's after them."""
    planned = Planned()
    planned.lists({"1": "Peru", "2": "Chad"})

    async def overtaken() -> None:
        planned.lists({"1": "Chad", "2": "Chad"})
        await planned.plan(publisher=MemoryPublisher(planned.log))

    planned.publisher.meanwhile = overtaken
    plan = await planned.plan()
    assert planned.countries() == {"chad": (plan.revision, ["1", "2"]), "peru": (plan.revision, [])}


async def test_the_most_frequent_spelling_of_a_country_is_shown() -> None:
    """Spellings of a country are one country of the plan, under the name that most of its cities have."""
    planned = Planned()
    for listed, shown in ((" Peru ", "PERU", "Peru"), "Peru"), (("PERU", "Peru", "PERU"), "PERU"):
        planned.lists({str(number): country for number, country in enumerate(listed)})
        plan = await planned.plan()
        assert {slug: country.name for slug, country in plan.countries.items()} == {"peru": shown}


async def test_a_country_of_too_many_cities_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the totals of a country-day always fit into 64 bits. The plan stays as it was."""
    monkeypatch.setattr(planner, "COUNTRY_CITIES_MAX", 2)
    planned = Planned()
    planned.lists({"1": "Peru", "2": "Peru", "3": "Chad"})
    before = await planned.plan()
    planned.lists({"1": "Peru", "2": "Peru", "3": "Peru"})
    assert await planned.plan() == before
    (failed,) = (event for event in planned.published(Topic.REQUEST_PROGRESS) if isinstance(event, RequestFailed))
    assert "Peru has more than 2 cities" in failed.reason


@pytest.mark.parametrize(("bad", "told"), [(0, "it is empty"), (2, "none of its 2 entries is a city")])
async def test_an_empty_city_list_fails_the_request(bad: int, told: str) -> None:
    """An empty list, or one of bad entries alone, leaves the plan as it was; a setting allows it."""
    planned = Planned()
    planned.lists({"1": "Peru"})
    before = await planned.plan()
    planned.lists({}, bad=bad)
    assert await planned.plan() == before
    (failed,) = (event for event in planned.published(Topic.REQUEST_PROGRESS) if isinstance(event, RequestFailed))
    assert told in failed.reason
    assert "TRIPFOLD_UPSTREAM_ALLOW_EMPTY_CITY_LIST" in failed.reason
    assert (failed.bad_cities_count, len(failed.bad_cities)) == (bad, bad)
    planned.allow_no_cities = True
    assert (await planned.plan()).countries == {}


async def test_an_unchanged_plan_is_written_only_to_remove_an_intent() -> None:
    """A list of the same content costs no write, unless another planner has left a write intent."""
    planned = Planned()
    planned.lists({"1": "Peru"})
    before = await planned.plan()
    planned.store.raced_key = keys.plan(DATE)  # until it is written
    assert await planned.plan() == before
    assert planned.store.raced_key
    planned.store.write(keys.plan(DATE), objects.encode(msgspec.structs.replace(before, write_intent="another's")))
    assert await planned.plan() == before
    assert not planned.store.raced_key


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (101, 102)])
async def test_a_request_counts_the_bad_entries_of_its_own_city_list(before: int, after: int) -> None:
    """A request tells how many entries its own list had that are no cities, also where all others are as before."""
    planned = Planned()
    planned.lists({"1": "Peru"}, bad=before)
    await planned.plan()
    planned.lists({"1": "Peru"}, bad=after)
    await planned.plan()
    told = [event for event in planned.published(Topic.REQUEST_PROGRESS) if isinstance(event, RequestPlanned)]
    assert [event.bad_cities_count for event in told] == [before, after]


async def test_a_plan_that_lost_its_race_is_not_published() -> None:
    """After a compare-and-swap conflict the planner plans again from the other plan: no revision has two lists."""
    planned = Planned()
    planned.lists({"1": "Peru", "2": "Chad"})

    async def other() -> None:
        planned.lists({"1": "Chad", "2": "Chad"})
        await planned.plan(publisher=MemoryPublisher(planned.log))

    planned.store.raced_key, planned.store.meanwhile = keys.plan(DATE), other
    conflicts = value("tripfold_cas_conflicts_total", object="plan")
    plan = await planned.plan()
    assert value("tripfold_cas_conflicts_total", object="plan") == conflicts + 1
    told: dict[tuple[str, int], set[tuple[str, ...]]] = {}
    for event in planned.published(Topic.CITY_STATS):
        assert isinstance(event, CountryDayPlanned)
        told.setdefault((event.country, event.plan_revision), set()).add(event.city_ids)
    assert all(len(lists) == 1 for lists in told.values()), told
    assert planned.countries()["chad"] == (plan.revision, ["1", "2"])


async def test_a_slug_is_minted_once_also_in_a_race() -> None:
    """If two planners mint one slug for two names, the first name keeps it."""
    planned = Planned()
    planned.lists({"1": "Россия"})

    async def other() -> None:
        minted = Countries(slugs={"Rossiia": CountrySlug("rossiia")})
        planned.store.write(keys.COUNTRIES, objects.encode(minted))

    planned.store.raced_key, planned.store.meanwhile = keys.COUNTRIES, other
    conflicts = value("tripfold_cas_conflicts_total", object="countries")
    plan = await planned.plan()
    assert value("tripfold_cas_conflicts_total", object="countries") == conflicts + 1
    slugs = objects.decode(Countries, planned.store.objects[keys.COUNTRIES].body, keys.COUNTRIES).slugs
    assert slugs["Rossiia"] == "rossiia"
    assert list(plan.countries) == [slugs["Россия"]]
    assert slugs["Россия"] != "rossiia"


async def test_a_cancelled_request_ends_under_the_plan_of_another_request() -> None:
    """One whose tasks were lost is sent on its way again, and its cities are skipped, though another made its plan."""
    world = World()
    first = world.request(WHOLE)
    await world.run_to_rest()
    request_id = world.request(UpstreamState(cities=HOME, files=WHOLE.files))
    await world.turn("planner")
    await world.turn("progress")
    key = keys.request(request_id)
    record = objects.decode(RequestRecord, world.store.objects[key].body, key)
    world.store.write(key, objects.encode(msgspec.structs.replace(record, cancelled_at=world.clock())))
    world.log.commit("worker", world.log.records(Topic.CITY_TASKS))
    await world.run_to_rest()
    await world.requeue()
    await world.run_to_rest()
    ended = {record.request_id: status_of(record) for record in requests(world)}
    assert ended == {first: Status.COMPLETED, request_id: Status.CANCELLED}
