"""Random histories of one date, as a state machine with checks after each step.

The fault model:
- Files are corrected, cities move, leave and come back, files and the city list become invalid, and requests arrive.
  The city list spells the countries in several ways.
- The ids of the city list change between numbers and strings, and the list has a city twice.
- The bucket loses records of requests that a backfill waits for.
- Kafka loses requests. Later ones join them, and there are more records than the requeue lists each time.
- Processes handle batches in any order of partitions, are replaced in the middle of a batch, and resume later.
- Any call across a port breaks in any way. Records are delivered again, topics are compacted and hold poison records,
  also with figures and revisions beyond their bounds. The handling of some records always fails.
- Runs of a schedule are claimed and started. Backfills are opened, paused, resumed, cancelled and retried. Planners
  advance both by clocks that differ by an hour.
- Rebuild, repair, gc, builds of the Parquet tables and a planner's look at backfills can pause at a call. No pause is
  longer than the minimum age for gc, which is also that of refused files.
- Somebody deletes live summaries. In a copy of the world, any objects are damaged or deleted, and mended.

After every step:
- Each served number is one that some manifest had. Raw objects are written before their manifests, and exist.
- Totals match their ledger, no revision or version goes back, and a completed request is served.
- A reader that has read before sees every summary that is published or counts as served.

At rest, after one more request, the reader sees every summary as it is stored. The numbers match the upstream, and so
do the tables after one more build. Manifests and plans give the same bytes. If a summary was deleted, that request
writes it again. A repair completes it before these checks, since a new process does not know the cities that left.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import random
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shared.domain import keys
from shared.domain.backfills import NotPossible, cancelled, paused, resumed, retried
from shared.domain.contribution import Contribution
from shared.domain.events import BACKGROUND, Background, Source
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import Backfill, BackfillStatus
from shared.domain.requests import Status, status_of
from shared.domain.topics import Topic
from tests.fakes.builders import FORGED_STATS, City, Trip, UpstreamState
from tests.fakes.faults import Break
from tests.fakes.log import PARTITIONS, BrokenContract
from tests.fakes.oracle import ExpectedDay
from tests.fault import checks, damage
from tests.fault.watcher import Watcher
from tests.fault.world import BREAKING, DATE, GC_AGE, REQUEUE_LISTED_MAX, ROLES, Job, NotAtRest, Process, World

HISTORIES_PER_SEED = 200
STEPS_MAX = 40
REQUESTS_MAX = 6
JOBS_MAX = 2
BACKFILLS_MAX = 2
LOOKS_MAX = 20

CITIES = (1, 2, 3)
COUNTRIES = ("Armenia", "Brasil", "Chad")
File = tuple[Trip, ...]

GOOD_FILES: tuple[File, ...] = (
    (),
    (Trip(passengers=30, delay_ms=61_500), Trip(passengers=0, delay_ms=0, accident=True)),
    (Trip(passengers=31, delay_ms=60_000),),
    (Trip(passengers=7, delay_ms=1), Trip(passengers=8, delay_ms=2), Trip(passengers=9, delay_ms=3)),
)
BROKEN_FILE = b'[{"passengers":1}]'
POISON = (
    *(b"{", b"", b"\xff", b'{"type":"city-day-stats"}', b"null"),
    *FORGED_STATS,
)

_Result = TypeVar("_Result")

cities = st.sampled_from(CITIES)
countries = st.sampled_from(COUNTRIES)
spellings = st.sampled_from((str.upper, str.title, str.lower))
roles = st.sampled_from(sorted(ROLES))
breaks = st.sampled_from(Break)
calls = st.integers(0, 30)
few_calls = st.integers(0, 8)
orders = st.permutations(range(PARTITIONS))


class Possible(msgspec.Struct):
    """The contributions that a worker may have stored for a city, depending on when it read the file."""

    countries: set[str] = msgspec.field(default_factory=set)
    files: set[File] = msgspec.field(default_factory=set)


class History(RuleBasedStateMachine):
    """One history. ``kind`` is the class of its world; mutations use others."""

    kind: type[World] = World

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self.world = self.kind()
        self.watcher = Watcher(self.world)
        self.listed: dict[int, str] = {}
        self.spelling: Callable[[str], str] = str.title
        self.has_lost_summaries = False
        self.files: dict[int, File | bytes] = {}
        self.list_is_bad = False
        self.in_text: frozenset[int] = frozenset()
        self.twice: frozenset[int] = frozenset()
        self.possible: dict[int, Possible] = {city: Possible() for city in CITIES}
        self.dead_letters = 0
        self.former: dict[str, Process] = {}
        self.jobs: list[Job] = []
        self.backfills: list[RequestId] = []
        self.last_request: RequestId | None = None

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # a history that has not failed before its end
                self.come_to_rest()
        finally:
            self.world.port_calls.heal()
            self._runner.run(self._let_go())
            self._runner.close()

    def _run(self, step: Coroutine[Any, Any, _Result]) -> _Result:
        try:
            return self._runner.run(step)
        except (NotAtRest, BrokenContract) as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error

    @invariant()
    def nothing_is_wrong(self) -> None:
        """Run all checks that hold after every step."""
        self._run(self.watcher.look())

    @initialize(placed=st.fixed_dictionaries(dict.fromkeys(CITIES, countries)), spelling=spellings)
    def begin(self, placed: dict[int, str], spelling: Callable[[str], str]) -> None:
        """Let the upstream list all cities, each with a good file."""
        self.listed = dict(placed)
        self.spelling = spelling
        self.files = {city: GOOD_FILES[city] for city in CITIES}
        # It comes due by itself in 2028 only: a history has one date, and gc moves the clock by weeks.
        self.world.set_schedule("leap-day", cron="0 0 29 2 *")
        self._hold()

    # Steps of the upstream.

    @rule(city=cities, file=st.sampled_from(GOOD_FILES))
    def correct_a_file(self, city: int, file: File) -> None:
        """Put another file in place of a city's."""
        self.files[city] = file
        self._hold()

    @rule(city=cities, country=countries)
    def list_a_city(self, city: int, country: str) -> None:
        """Move a city to a country, or list one that had left."""
        self.listed[city] = country
        self._hold()

    @rule(city=cities)
    def remove_a_city(self, city: int) -> None:
        """Take a city out of the list."""
        self.listed.pop(city, None)
        self._hold()

    @rule(in_text=st.frozensets(cities), twice=st.frozensets(cities))
    def write_ids_differently(self, in_text: frozenset[int], twice: frozenset[int]) -> None:
        """Let the list have some ids as strings, and some cities twice."""
        self.in_text, self.twice = in_text, twice
        self._hold()

    @rule(spelling=spellings)
    def spell_the_countries(self, spelling: Callable[[str], str]) -> None:
        """Let the city list spell the countries in another way, which has the same slugs."""
        self.spelling = spelling
        self._hold()

    @rule(city=cities, missing=st.booleans())
    def spoil_a_file(self, city: int, missing: bool) -> None:
        """Make a city's file invalid or missing."""
        self.files[city] = BROKEN_FILE
        if missing:
            del self.files[city]
        self._hold()

    @rule(bad=st.booleans())
    def spoil_the_list(self, bad: bool) -> None:
        """Make the city list fail, or work again."""
        self.list_is_bad = bad
        self._hold()

    @rule(city=cities, cuts=st.lists(st.integers(0, 150), max_size=2))
    def cut_downloads(self, city: int, cuts: list[int]) -> None:
        """Let the next downloads of a city break off."""
        self.world.upstream.cuts[str(city)] = cuts

    # Steps of users and Kafka.

    @precondition(lambda self: self.world.requests < REQUESTS_MAX)
    @rule(lost=st.booleans())
    def publish_a_request(self, lost: bool) -> None:
        """Request the date. Kafka may lose the event."""
        self._request(lost=lost)

    @rule()
    def end_other_requests(self) -> None:
        """Let as many requests of another date end as the requeue lists each time."""
        self.world.end_other_requests(REQUEUE_LISTED_MAX)

    @rule(role=roles, partition=st.integers(0, PARTITIONS - 1), records=st.integers(1, 4))
    def redeliver(self, role: str, partition: int, records: int) -> None:
        """Deliver committed records again, as after a failed commit."""
        self.world.log.rewind(role, ROLES[role].topic, partition, records)

    @rule()
    def compact(self) -> None:
        """Compact the compacted topics."""
        for topic in (Topic.CITY_STATS, Topic.COUNTRY_DAY_SUMMARIES):
            self.world.log.compact(topic)

    @rule(role=roles, value=st.sampled_from(POISON), city=cities)
    def poison(self, role: str, value: bytes, city: int) -> None:
        """Append a poison record to a topic."""
        self.world.log.append(ROLES[role].topic, f"{DATE}/poison/{city}/{self.dead_letters}".encode(), value)
        self.dead_letters += 1

    @rule(role=roles, city=cities)
    def break_a_handler(self, role: str, city: int) -> None:
        """Append a record whose handling always fails."""
        key = f"{DATE}".encode() + BREAKING + f"{city}/{self.dead_letters}".encode()
        self.world.log.append(ROLES[role].topic, key, b"{}")
        self.dead_letters += 1

    # Steps of processes.

    @rule(role=roles, order=orders)
    def handle_a_batch(self, role: str, order: list[int]) -> None:
        """Let one process handle its next batch, its partitions in any order."""
        self._run(self.world.turn(role, partitions=order))

    @rule(rounds=st.integers(1, 4), order=orders)
    def handle_batches(self, rounds: int, order: list[int]) -> None:
        """Let every process handle some batches."""
        self._handle(rounds, order)

    @rule(after=calls, how=breaks)
    def break_a_call(self, after: int, how: Break) -> None:
        """Let one of the next calls across a port break."""
        self.world.port_calls.break_after(after, how)

    @rule(role=roles, back=st.booleans())
    def rebalance(self, role: str, back: bool) -> None:
        """Give a role to another process: a new one, or the previous one with its old state."""
        former = self.former.get(role)
        if role in self.world.roles_living:
            self.former[role] = self.world.living(role)
        self.world.replace(role, former if back and former is not None and not former.dead else None)
        self.world.resumed += 1

    @rule()
    def go_on(self) -> None:
        """Resume the paused processes."""
        self._run(self.world.resume_paused())

    # Steps of operators.

    @precondition(lambda self: len(self.jobs) < JOBS_MAX)
    @rule(from_kafka=st.booleans(), stand_still_after=st.none() | calls)
    def rebuild(self, from_kafka: bool, stand_still_after: int | None) -> None:
        """Start a rebuild that may pause after some calls."""
        self.jobs.append(self._run(self.world.rebuild(from_kafka=from_kafka, calls=stand_still_after)))

    @precondition(lambda self: len(self.jobs) < JOBS_MAX)
    @rule(stand_still_after=st.none() | calls)
    def repair(self, stand_still_after: int | None) -> None:
        """Start a repair."""
        self.jobs.append(self._run(self.world.repair(calls=stand_still_after)))

    @precondition(lambda self: len(self.jobs) < JOBS_MAX)
    @rule(stand_still_after=st.none() | calls)
    def build_tables(self, stand_still_after: int | None) -> None:
        """Start a build of the Parquet tables; another one may be paused."""
        self.jobs.append(self._run(self.world.build_tables(calls=stand_still_after)))

    @precondition(lambda self: len(self.jobs) < JOBS_MAX)
    @rule(stand_still_after=st.none() | calls)
    def gc(self, stand_still_after: int | None) -> None:
        """Start gc with its minimum age, so that it deletes nothing recent."""
        self.jobs.append(self._run(self.world.gc(calls=stand_still_after)))

    @rule(refused=st.none() | cities, stand_still_after=st.none() | few_calls)
    def gc_later(self, refused: int | None, stand_still_after: int | None) -> None:
        """Resume everything, wait for the minimum age, and run gc. A file may be refused before and while gc pauses."""
        if refused is not None:
            self.files[refused] = BROKEN_FILE
            self._hold()
            self._request_and_handle()
        self._run(self._let_go())
        self._run(self.world.requeue())
        self.world.clock.advance(GC_AGE.total_seconds() + 1)
        self.jobs.append(self._run(self.world.gc(calls=stand_still_after)))
        if refused is not None:
            self._request_and_handle()

    @precondition(lambda self: self.jobs)
    @rule(stand_still_after=st.none() | calls)
    def go_on_with_a_job(self, stand_still_after: int | None) -> None:
        """Resume a paused command."""
        job = self.jobs.pop(0)
        self._run(job.resume(calls=stand_still_after))
        if not job.ended:
            self.jobs.append(job)

    @precondition(lambda self: not self.world.has_paused_process and all(job.ended for job in self.jobs))
    @precondition(lambda self: bool(checks.live_summaries(self.world)))
    @rule(which=st.integers(0, len(COUNTRIES) - 1))
    def lose_a_summary(self, which: int) -> None:
        """Delete a live summary."""
        live = checks.live_summaries(self.world)
        lost = live[which % len(live)]
        del self.world.store.objects[keys.summary(checks.live_generation(self.world), lost.date, lost.country)]
        self.watcher.lose(lost.country)
        self.has_lost_summaries = True

    @rule(which=st.lists(st.integers(0, 999), min_size=1, max_size=3), body=st.sampled_from((b"", b"{", None)))
    def damage_a_copy(self, which: list[int], body: bytes | None) -> None:
        """In a copy of the world, damage some objects or remove them. Go on, mend the bucket, and request again."""
        self._run(self._damage_a_copy(which, body))

    async def _damage_a_copy(self, which: list[int], body: bytes | None) -> None:
        copy = self.world.continued()
        truth = msgspec.structs.replace(self._truth(), cities=self._listed_cities())
        damaged = damage.damage(copy, which, body)
        wrong = []
        if not set(damaged) & set(damage.STOPPING):
            wrong += await damage.go_on(copy, truth)
        await damage.mend(copy, truth, is_lost=body is None)
        await copy.repair(drop_lost=True)  # what was made again does not know where its cities were before
        wrong += await copy.verify() + checks.unfinished(copy)
        wrong += self._against_the_upstream(copy, dict(self.possible))
        assert not wrong, "\n".join([f"after damage to {damaged}:", *wrong])

    @rule()
    def requeue(self) -> None:
        """Requeue stalled requests."""
        self._run(self.world.requeue())

    # Steps of backfills. They have the date of the world only, so that its oracle describes them.

    @precondition(lambda self: self.world.backfills < BACKFILLS_MAX)
    @rule(background=st.sampled_from((BACKGROUND, Background(source=Source.BUCKET))))
    def open_a_backfill(self, background: Background) -> None:
        """Open a backfill, which downloads files or reads stored ones again."""
        self.backfills.append(self.world.open_backfill(DATE, DATE, background=background))
        self._note_possible()

    @precondition(lambda self: self.backfills and len(self.jobs) < JOBS_MAX)
    @rule(stand_still_after=st.none() | calls, hours=st.integers(-1, 1))
    def advance_backfills(self, stand_still_after: int | None, hours: int) -> None:
        """Let a planner, whose clock may be wrong, look at the backfills; it may pause after some calls."""
        off_by = dt.timedelta(hours=hours)
        self.jobs.append(self._run(self.world.advance_jobs(clock_off_by=off_by, calls=stand_still_after)))

    @precondition(lambda self: self.backfills)
    @rule(change=st.sampled_from((paused, resumed, cancelled, retried)), which=st.integers(0, BACKFILLS_MAX - 1))
    def change_a_backfill(self, change: Callable[[Backfill, dt.datetime], Backfill], which: int) -> None:
        """Pause, resume, cancel or retry a backfill, if its state allows it."""
        with contextlib.suppress(NotPossible):
            self.world.change_backfill(self.backfills[which % len(self.backfills)], change)

    @precondition(lambda self: self.backfills)
    @rule(which=st.integers(0, BACKFILLS_MAX - 1))
    def lose_records(self, which: int) -> None:
        """Lose the record of the request that a backfill waits for."""
        self.world.lose_records(self.backfills[which % len(self.backfills)])

    # Steps of a schedule, whose runs have the date of the world too.

    @precondition(lambda self: self.world.backfills < BACKFILLS_MAX)
    @rule()
    def claim_a_run(self) -> None:
        """Claim a run of the schedule, if the one before has ended."""
        self._run(self.world.claim_run("leap-day"))
        self._note_possible()

    @precondition(lambda self: len(self.jobs) < JOBS_MAX)
    @rule(stand_still_after=st.none() | calls, hours=st.integers(-1, 1))
    def run_schedules(self, stand_still_after: int | None, hours: int) -> None:
        """Let a planner look at the schedules; it may pause after some calls."""
        off_by = dt.timedelta(hours=hours)
        self.jobs.append(self._run(self.world.run_schedules(clock_off_by=off_by, calls=stand_still_after)))

    # Checks at rest.

    @rule()
    def come_to_rest(self) -> None:
        """Run everything to its end, request once more, and compare the served numbers with the upstream."""
        self.list_is_bad = False
        self._hold()
        self._run(self._rest())
        self._run(self.watcher.look_at_rest())
        wrong = self._wrong_at_rest()
        assert not wrong, "\n".join(wrong)

    async def _rest(self) -> None:
        world = self.world
        world.port_calls.heal()
        world.upstream.cuts.clear()
        await self._let_go()
        await damage.requeue_all(world)
        await self._end_backfills()
        self._request()
        await world.run_to_rest()
        if self.has_lost_summaries:
            missing = checks.countries_without_summary(world)
            assert not missing, f"the last request has ended, and {missing} have no summary"
            await world.repair()
            self.has_lost_summaries = False
        await world.build_tables()

    async def _end_backfills(self) -> None:
        await self.world.run_schedules()
        run = self.world.schedule("leap-day").run
        assert run is None or run.started, f"{run} was claimed and not started"
        for backfill_id in self.world.open_backfills:
            if self.world.backfill(backfill_id).status is BackfillStatus.PAUSED:
                self.world.change_backfill(backfill_id, resumed)
        for _ in range(LOOKS_MAX):
            if not self.world.open_backfills:
                return
            await self.world.advance_jobs()
            await self.world.run_to_rest()

    async def _let_go(self) -> None:
        await self.world.resume_paused()
        while self.jobs:
            job = self.jobs.pop()
            if not job.ended:
                await job.resume()
                self.jobs.append(job)

    def _wrong_at_rest(self) -> list[str]:
        wrong = checks.unfinished(self.world) + checks.summaries_against_manifests(self.world)
        wrong += checks.summaries_against_a_replay(self.world)
        wrong += checks.raw_objects_against_manifests(self.world)
        wrong += checks.tables_against_summaries(self.world)
        wrong += checks.topics_against_the_bucket(self.world, dead_letters=self.dead_letters)
        wrong += [one for one in self.world.unexpected if "was refused" not in one]
        assert self.last_request is not None
        last = checks.record_of(self.world, self.last_request)
        wrong += [f"backfill {one} has not ended" for one in self.world.open_backfills]
        wrong += checks.jobs_without_requests_of_their_own(self.world)
        wrong += checks.tasks_of_backfills_in_the_foreground(self.world)
        failed = any(not isinstance(self.files.get(city), tuple) for city in self.listed)
        expected = Status.COMPLETED_WITH_FAILURES if failed else Status.COMPLETED
        if status_of(last) is not expected:
            wrong.append(f"the last request: expected {expected.value}, found {status_of(last).value}")
        return wrong + self._against_the_upstream(self.world, self.possible)

    def _against_the_upstream(self, world: World, known: dict[int, Possible]) -> list[str]:
        """Compare the served totals with the upstream's files, now or, for a removed city, earlier."""
        wrong = []
        placed: dict[int, tuple[str, File]] = {}
        by_city = {manifest.city_id: manifest for manifest in checks.manifests(world) if manifest.date == DATE}
        for city in CITIES:
            possible = known[city]
            file = self.files.get(city)
            if city in self.listed and isinstance(file, tuple):
                possible = Possible({self.listed[city]}, {file})
            manifest = by_city.get(CityId(str(city)))
            if manifest is None:
                if city in self.listed and isinstance(file, tuple):
                    wrong.append(f"city {city} has no manifest")
                continue
            found = [
                (country, one)
                for country in possible.countries
                for one in possible.files
                if (manifest.country, manifest.contribution) == (country.lower(), contribution_of(one))
            ]
            if not found:
                wrong.append(f"city {city}: expected one of {possible}, found {manifest}")
                continue
            placed[city] = found[0]
            known[city] = Possible({found[0][0]}, {found[0][1]})
        summaries = [summary for summary in checks.live_summaries(world) if summary.date == DATE]
        served = {summary.country: checks.day_of(summary) for summary in summaries}
        for country in COUNTRIES:
            expected = self._expected_day(country, placed)
            day = served.get(CountrySlug(country.lower()), ExpectedDay(complete=expected.cities_expected == 0))
            if world is not self.world and expected.cities_expected == 0:
                # A plan that was made again does not know which countries left before.
                day = msgspec.structs.replace(day, complete=expected.complete)
            if day != expected:
                wrong.append(f"{country}: expected {expected}, found {day}")
        return wrong

    def _expected_day(self, country: str, placed: Mapping[int, tuple[str, File]]) -> ExpectedDay:
        here = {city for city, (where, _) in placed.items() if where == country}
        trips = [trip for city in here for trip in placed[city][1]]
        expected = {city for city, where in self.listed.items() if where == country}
        return ExpectedDay(
            trips=len(trips),
            passengers=sum(trip.passengers for trip in trips),
            accidents=sum(trip.accident for trip in trips),
            delay_total_ms=sum(trip.delay_ms for trip in trips),
            has_data=bool(here),
            cities_reported=len(expected & here),
            cities_expected=len(expected),
            complete=expected <= here,
        )

    def _request_and_handle(self) -> None:
        if self.world.requests < REQUESTS_MAX:
            self._request()
        self._handle(6, range(PARTITIONS))

    def _handle(self, rounds: int, order: Sequence[int]) -> None:
        for role in [role for _ in range(rounds) for role in ROLES]:
            self._run(self.world.turn(role, partitions=order))

    def _request(self, *, lost: bool = False) -> None:
        self.last_request = self.world.request(self._truth(), lost=lost)
        self._note_possible()

    def _hold(self) -> None:
        self._truth().write_into(self.world.upstream, DATE)
        self._note_possible()

    def _note_possible(self) -> None:
        for city in CITIES:
            if city in self.listed:
                self.possible[city].countries.add(self.listed[city])
            file = self.files.get(city)
            if isinstance(file, tuple):
                self.possible[city].files.add(file)

    def _listed_cities(self) -> tuple[City, ...]:
        return tuple(City(city, self.spelling(country)) for city, country in sorted(self.listed.items()))

    def _truth(self) -> UpstreamState:
        listed = self._listed_cities()
        return UpstreamState(
            cities=None if self.list_is_bad else listed, files=self.files, in_text=self.in_text, twice=self.twice
        )


def contribution_of(file: File) -> Contribution:
    """Add up a file."""
    return Contribution(
        trips=len(file),
        passengers=sum(trip.passengers for trip in file),
        accidents=sum(trip.accident for trip in file),
        delay_total_ms=sum(trip.delay_ms for trip in file),
    )


def run_histories(seed_number: int, histories: int, *, kind: type[World] = World, shrink: bool = True) -> None:
    """Run this many histories from a seed; raise the error of the simplest failing one."""
    machine = seed(seed_number)(type("SeededHistory", (History,), {"kind": kind}))
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=STEPS_MAX,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


def new_seed() -> int:
    """Return a random seed."""
    return random.SystemRandom().randrange(1_000_000_000)
