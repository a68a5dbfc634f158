"""A simulation of Tripfold in virtual time: several dates, two processes of each service, users and faults.

The fault model:
- Calls to the bucket, Kafka and the upstream take time. They fail, are slow, or lose their response. A call to a slow
  bucket takes up to a minute, and the upstream closes connections that nobody reads meanwhile. A write can happen
  after its client gave up. Outages last from a second to 20 minutes.
- Responses of Kafka are damaged. Some records cannot be decoded, until an operator skips them.
- Processes are killed, stopped, paused and cut off from Kafka, for less and for more than a session. Their clocks
  differ. Consumer groups rebalance, and deliver records again.
- A host is suspended for longer than gc keeps counters of the change index: one with a reader, or with an aggregate.
- The upstream corrects, moves, spoils and takes back files. A download can take hours. Its list of cities changes ids
  between numbers and strings.
- Users request dates, cancel and retry. Backfills and a schedule run. An operator rebuilds the summaries.

`CheckedBucket` checks each write. Besides:
- A user who sees that a request is completed reads numbers that are at least as new.
- A process that works keeps its partitions. It does not call a bucket that refuses its calls over and over.
- A request of stored files is planned within STORED_LIMIT_S, also while the upstream is down.
- When all faults have ended, everything comes to rest within REST_LIMIT_S. After one more request of each date, the
  served numbers are those of the upstream. The manifests, the ledgers, the topics and the raw objects agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial

import msgspec
from msgspec import UNSET

from services.aggregate.replay.rebuild import Rebuild
from services.api.http.date_range import DateRange
from services.api.requests.service import Requests
from services.api.statistics.reader import SummaryReader
from shared.domain import keys, objects
from shared.domain.backfills import NotPossible, cancelled, is_closed, new_backfill
from shared.domain.errors import OperatorError
from shared.domain.events import Background, CityFinished, Outcome, Source
from shared.domain.ids import CityId, CountrySlug, RequestId, mint_request_id
from shared.domain.objects import Backfill, GenerationPointer, Manifest
from shared.domain.requests import Status, status_of
from shared.domain.schedules import new_schedule
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.kafka.skip_markers import mark
from shared.runtime.metrics import Concern
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings, load_settings
from shared.storage.backfills import change_backfill, open_backfill
from tests.fakes.fetching import BAD_HEADER
from tests.fakes.log import MemoryLog
from tests.fault import checks
from tests.simulation.bucket import CheckedBucket
from tests.simulation.kafka import Kafka
from tests.simulation.processes import Process, publisher_of, without_side_effects
from tests.simulation.steps import CITIES, COUNTRIES, DATES, GC_AGE_S, PROCESSES, Step, first_file
from tests.simulation.store import SimulatedStore
from tests.simulation.upstream import File, UpstreamHistory
from tests.simulation.virtual_time import VirtualLoop, run_virtually, task_factory
from tripfold.operate.gc import collect_garbage

BEGIN = dt.datetime(2024, 6, 3, 10, tzinfo=dt.UTC)
REST_LIMIT_S = 2 * 3_600.0
LOOK_INTERVAL_S = 10.0
QUIET_S = 60.0
"""Longer than each wait of a handler when there is no fault."""
REFUSALS_MAX = 200
"""How often the bucket refuses a process within ten seconds of an outage, at most. Its retries wait ever longer."""
CLOCK_OFF_BY_MAX_S = 120.0
STORED_LIMIT_S = 120.0
"""How soon a request that needs no upstream is planned, if there is no other fault."""
SETTLING_S = 300.0
"""How long after the end of a fault its effects may last, such as a rebalance."""
FAULTS_OF_OTHERS = {
    "kill",
    "stop",
    "pause",
    "cut_off",
    "store_down",
    "store_slow",
    "kafka_down",
    "slow",
    "unlucky",
    "redeliver",
}
"""The steps after which a request of stored files may be late. Faults of the upstream are not among them."""

STORE_WAIT_MAX_S = 60.0
STORE_TAIL_SHARE = 0.03
"""The share of calls to a slow bucket that may take a minute. The client gives up sooner."""
CAUSES = {
    "answered 404": {"put_file"},
    "answered 500": {"upstream_fails"},
    "connection refused": {"upstream_down"},
    "broke off": {"unlucky"},
    "took longer than": {"upstream_trickles", "slow"},
    "record 1": {"put_file"},
    "no file of the city is stored": {"backfill"},
}
"""The reasons for which a city may fail, and the steps of which one must have caused it. No step of the bucket may."""

SETTINGS: Settings = load_settings(
    {
        "TRIPFOLD_INGEST_DEADLINE_S": "60",
        "TRIPFOLD_UPSTREAM_ATTEMPTS": "3",
        "TRIPFOLD_UPSTREAM_OUTAGE_LIMIT_S": "300",
        "TRIPFOLD_STALLED_REQUEST_AFTER_S": "120",
        "TRIPFOLD_JOBS_INTERVAL_S": "20",
        "TRIPFOLD_UPSTREAM_ALLOW_EMPTY_CITY_LIST": "true",
    }
)


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a simulation: what was wrong, its duration in virtual seconds, its calls, and how calls failed."""

    wrong: tuple[str, ...]
    simulated_s: float
    calls: int
    faults: dict[str, int]


def simulate(steps: Sequence[Step], *, seed: int, rest_limit_s: float = REST_LIMIT_S) -> Ended:
    """Run a schedule. Equal schedules and seeds end equally."""

    async def run(loop: VirtualLoop) -> Ended:
        simulation = Simulation(loop, seed, rest_limit_s)
        began_s = loop.now_s
        try:
            await simulation.run(steps)
        except AssertionError as error:
            simulation.complain(str(error))
        finally:
            await simulation.end()
        return Ended(
            wrong=tuple(dict.fromkeys(simulation.wrong)),
            simulated_s=loop.now_s - began_s,
            calls=simulation.calls,
            faults=dict(simulation.faults),
        )

    with without_side_effects():
        return run_virtually(run, seed=seed)


class Simulation:
    """The processes, their surroundings and their users. Its public methods with a verb are the steps."""

    def __init__(self, loop: VirtualLoop, seed: int, rest_limit_s: float) -> None:
        self.loop = loop
        self.random = random.Random(seed)
        self.wrong: list[str] = []
        self.calls = 0
        self.faults: Counter[str] = Counter()
        self.upstream = UpstreamHistory()
        self.bucket = CheckedBucket(self)
        self.kafka = Kafka(self)
        self.store_down_until_s = 0.0
        self._began_s = self.changed_at_s = loop.now_s
        self._rest_limit_s = rest_limit_s
        self._slow_until_s = self._unlucky_until_s = 0.0
        self._slow_times = 1.0
        self._store_slow_until_s = 0.0
        self._store_wait_usual_s = 1.0
        self._store_far_s = 0.0
        self._taken: set[str] = set()
        self._unlucky_share = 0.0
        self._calm_from_s = loop.now_s
        self._tasks_of: dict[str, dict[asyncio.Task[object], None]] = {}
        self._processes: dict[str, Process] = {}
        self._started: dict[str, Process] = {}
        self._starts = 0
        self._undecodable = 0
        self._users: set[asyncio.Task[None]] = set()
        self._refusals: Counter[tuple[str, int]] = Counter()
        self._paused = 0
        self._healed = False
        self._requests: list[RequestId] = []
        self._last_requests: dict[dt.date, RequestId] = {}
        self._backfills: list[RequestId] = []
        loop.set_task_factory(task_factory(self._tasks_of))
        loop.suspended_s = self._suspended_s
        loop.set_exception_handler(lambda *_: None)  # killed tasks leave errors that nobody retrieves
        self._api = self._start_process("api")
        self._requests_api = Requests(
            SimulatedStore(self._api), publisher_of(self._api, SETTINGS), clock=self._api.clock
        )
        self._reader_process = self._start_process("reader")
        self._reader = SummaryReader(SimulatedStore(self._reader_process), cache_bytes=100_000)

    # The state that the checks of a world at rest compare.

    @property
    def store(self) -> CheckedBucket:
        return self.bucket

    @property
    def log(self) -> MemoryLog:
        return self.kafka.log

    @property
    def resumed(self) -> int:
        return self._paused

    # The surroundings of processes and ports.

    def clock(self) -> dt.datetime:
        """Return the true time."""
        return BEGIN + dt.timedelta(seconds=self.loop.now_s)

    def latency_s(self, least_s: float, usual_s: float) -> float:
        """Return the duration of a call: mostly usual, rarely long."""
        seconds = least_s + self.random.expovariate(1 / usual_s)
        return seconds * self._slow_times if self.loop.now_s < self._slow_until_s else seconds

    def store_wait_s(self) -> float:
        """Return how long the bucket takes for a call: as far as it is, or up to a minute while it is slow."""
        if self.loop.now_s >= self._store_slow_until_s:
            return self._store_far_s
        if self.random.random() < STORE_TAIL_SHARE:
            return self.random.uniform(0, STORE_WAIT_MAX_S)
        return min(STORE_WAIT_MAX_S, self.random.expovariate(1 / self._store_wait_usual_s))

    def is_unlucky(self, what: str) -> bool:
        """Decide whether a call fails in a certain way, and count those that do."""
        if self.loop.now_s >= self._unlucky_until_s or self.random.random() >= self._unlucky_share:
            return False
        self.faults[what] += 1
        return True

    def count_refusal(self, process: Process) -> None:
        """Count a call that an unavailable bucket refused."""
        span = process.name, int(self.loop.now_s / 10)
        self._refusals[span] += 1
        if self._refusals[span] == REFUSALS_MAX:
            self.complain(f"{process.name} was refused {REFUSALS_MAX} times within ten seconds")

    def note_fault(self, process: Process, what: Concern, reason: str) -> None:
        """Complain about a retried error that no fault of the simulation explains."""
        if reason.partition(":")[0].endswith(("Error", "Exception")) and "Kafka" not in reason:
            self.complain(f"{process.name} retries {what}: {reason}")

    def complain(self, what: str) -> None:
        """Note what is wrong."""
        self.wrong.append(f"{self.loop.now_s - self._began_s:.1f} s: {what}")

    # The run.

    async def run(self, steps: Sequence[Step]) -> None:
        """Take all steps, end all faults, and check what is served at rest."""
        pointer = GenerationPointer(changes_counted_since=self.clock())
        self.bucket.write(keys.CURRENT, objects.encode(pointer))
        self.upstream.list_cities({city: COUNTRIES[city % len(COUNTRIES)] for city in CITIES}, self.loop.now_s)
        for city in CITIES:
            for date in DATES:
                self.upstream.put_file(city, date, first_file(city), self.loop.now_s)
        for name in PROCESSES:
            self._start_process(name)
        self._spawn(self._watch_stored)
        for step in steps:
            await asyncio.sleep(max(0.0, self._began_s + step.at_s - self.loop.now_s))
            if step.what in FAULTS_OF_OTHERS:
                lasts_s = max((one for one in step.arguments if isinstance(one, float)), default=0.0)
                self._calm_from_s = max(self._calm_from_s, self.loop.now_s + lasts_s + SETTLING_S)
            self._taken.add(step.what)
            getattr(self, step.what)(*step.arguments)
        self._heal()
        await self._rest()
        for date in DATES:
            self.request(date)
        await self._rest()
        self.wrong += self._wrong_at_rest()

    async def end(self) -> None:
        """End all processes."""
        for user in self._users:
            user.cancel()
        for process in self._processes.values():
            await process.kill()

    def _start_process(self, name: str) -> Process:
        self._starts += 1
        off_by_s = self.random.uniform(-CLOCK_OFF_BY_MAX_S, CLOCK_OFF_BY_MAX_S)
        process = Process(self, f"{name}#{self._starts}", clock_off_by=dt.timedelta(seconds=off_by_s))
        self._tasks_of[process.name] = process.tasks
        self._processes[name] = self._started[process.name] = process
        role = name.partition("-")[0]
        if role not in {"api", "reader"}:
            process.start(role, SETTINGS)
        return process

    def _heal(self) -> None:
        """End all faults but those of single processes, which end by themselves."""
        self._healed = True
        now_s = self.loop.now_s
        self._slow_until_s = self._unlucky_until_s = self._store_slow_until_s = now_s
        self.store_down_until_s = self.kafka.down_until_s = now_s
        self.upstream.down_until_s = self.upstream.failing_until_s = self.upstream.trickling_until_s = now_s
        if self.upstream.cities is None:
            self._restore_list()

    async def _rest(self) -> None:
        """Wait until no work is left."""
        left: dict[str, object] = {}
        until_s = self.loop.now_s + self._rest_limit_s
        while self.loop.now_s < until_s:
            await asyncio.sleep(LOOK_INTERVAL_S)
            left = self._work_left()
            if not left:
                return
        raise AssertionError(f"not at rest {self._rest_limit_s:.0f} s after the last fault: {left}")

    def _work_left(self) -> dict[str, object]:
        left: dict[str, object] = {}
        if self._users:
            left["users"] = [str(user.get_coro()) for user in self._users]
        if unread := self.kafka.unread:
            left["unread"] = unread
        if self.loop.now_s - self.changed_at_s < QUIET_S:
            left["quiet"] = False
        requests = [one.request_id for one in checks.requests(self) if not status_of(one).ended]
        if requests:
            left["requests"] = requests
        backfills = [one for one in self._backfills if not self._has_ended(one)]
        if backfills:
            left["backfills"] = backfills
        return left

    def _has_ended(self, backfill_id: RequestId) -> bool:
        key = keys.backfill(backfill_id)
        return is_closed(objects.decode(Backfill, self.bucket.objects[key].body, key))

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        user = self._api.spawn(work)
        self._users.add(user)
        user.add_done_callback(self._users.discard)

    async def _watch_stored(self) -> None:
        """Complain about a request of stored files that is not planned within STORED_LIMIT_S of a time without faults.

        Ends with the faults.
        """
        seen_s: dict[RequestId, float] = {}
        while not self._healed:
            await asyncio.sleep(LOOK_INTERVAL_S)
            for record in checks.requests(self):
                if record.background is UNSET or record.background.source is not Source.BUCKET or record.planned:
                    continue
                since_s = max(seen_s.setdefault(record.request_id, self.loop.now_s), self._calm_from_s)
                if not status_of(record).ended and self.loop.now_s - since_s > STORED_LIMIT_S:
                    self.complain(
                        f"{record.request_id} reads stored files, and is not planned after {STORED_LIMIT_S} s"
                    )
                    return

    # Steps of users.

    def request(self, date: dt.date) -> None:
        """Request a date, and watch the request."""
        self._spawn(partial(self._request, date))

    async def _request(self, date: dt.date) -> None:
        called_s = self.loop.now_s
        while True:
            try:
                record = await self._requests_api.accept(date)
            except DependencyUnavailable:
                await asyncio.sleep(5)
            else:
                break
        accepted = self.bucket.accepted_at_s
        accepted[record.request_id] = max(accepted.get(record.request_id, 0.0), called_s)
        self._requests.append(record.request_id)
        self._last_requests[date] = record.request_id
        await self._watch(record.request_id, date)

    async def _watch(self, request_id: RequestId, date: dt.date) -> None:
        """Wait until a request has ended, and read its date. The numbers must be at least those that are stored."""
        while True:
            with contextlib.suppress(DependencyUnavailable):
                record = await self._requests_api.find(request_id)
                if record is not None and status_of(record).ended:
                    break
            await asyncio.sleep(10)
        stored = {country: self.bucket.live_summary(date, country) for country in map(CountrySlug, _slugs())}
        while True:
            with contextlib.suppress(DependencyUnavailable):
                read_date = partial(self._reader.read, DateRange(date, date))
                heads = (await self._reader_process.spawn(read_date)).heads or []
                break
            await asyncio.sleep(1)
        read = {head.country: head.version for head in heads}
        for country, summary in stored.items():
            if summary is not None and read.get(country, -1) < summary.version:
                self.complain(
                    f"{request_id} has ended; a reader sees version {read.get(country)} of {country}, and "
                    f"{summary.version} was stored before"
                )

    def cancel_request(self) -> None:
        """Cancel the latest request."""
        self._spawn(partial(self._change_request, self._requests_api.cancel))

    def retry_request(self) -> None:
        """Retry the latest request."""
        self._spawn(partial(self._change_request, self._requests_api.retry))

    async def _change_request(self, change: Callable[[str], Awaitable[object]]) -> None:
        if self._requests:
            with contextlib.suppress(OperatorError, DependencyUnavailable):
                await change(self._requests[-1])

    def backfill(self, source: str) -> None:
        """Open a backfill of all dates."""
        self._spawn(partial(self._open_backfill, Source(source)))

    async def _open_backfill(self, source: Source) -> None:
        backfill = new_backfill(mint_request_id(self.clock()), DATES[0], DATES[1], now=self.clock())
        if source is Source.BUCKET:
            backfill = msgspec.structs.replace(backfill, background=Background(source=source, again=True))
        while True:
            with contextlib.suppress(DependencyUnavailable):
                await open_backfill(SimulatedStore(self._api), backfill)
                break
            await asyncio.sleep(5)
        self._backfills.append(backfill.backfill_id)

    def cancel_backfill(self) -> None:
        """Cancel the latest backfill."""
        self._spawn(self._cancel_backfill)

    async def _cancel_backfill(self) -> None:
        if self._backfills:
            with contextlib.suppress(NotPossible, DependencyUnavailable):
                await change_backfill(SimulatedStore(self._api), self._backfills[-1], cancelled, self.clock())

    def schedule(self) -> None:
        """Make a schedule whose first run is due within the hour."""
        due = self.clock() + dt.timedelta(minutes=self.random.randint(1, 59))
        schedule = new_schedule(
            "nightly",
            cron=f"{due.minute} {due.hour} {due.day} {due.month} *",
            timezone="Etc/UTC",
            date_offset=(DATES[-1] - due.date()).days,
            recheck=0,
            max_parallel=1,
            complete_by=None,
            now=self.clock(),
        )
        self.bucket.write(keys.schedule("nightly"), objects.encode(schedule))

    def rebuild(self) -> None:
        """Rebuild all summaries from the bucket."""
        self._spawn(self._rebuild)

    async def _rebuild(self) -> None:
        rebuild = Rebuild(
            SimulatedStore(self._api),
            publisher_of(self._api, SETTINGS),
            token=f"token-{self.random.random()}",
            report=lambda *_: None,
        )
        with contextlib.suppress(OperatorError):
            await rebuild.run(take_over=True)

    def gc(self) -> None:
        """Collect garbage."""
        self._spawn(self._gc)

    async def _gc(self) -> None:
        store = SimulatedStore(self._api)
        age, deadline_s = dt.timedelta(seconds=GC_AGE_S), SETTINGS.ingest_deadline_s
        with contextlib.suppress(DependencyUnavailable):
            async for _ in collect_garbage(store, older_than=age, deadline_s=deadline_s, dry_run=False):
                pass

    # Steps of the upstream.

    def put_file(self, city: int, date: dt.date, file: File) -> None:
        """Correct or spoil a file, or take back what it was before."""
        self.upstream.put_file(city, date, file, self.loop.now_s)

    def list_city(self, city: int, country: str | None) -> None:
        """Move a city to a country, or take it out of the list."""
        cities = dict(self.upstream.cities or self._last_list())
        cities.pop(city, None)
        if country is not None:
            cities[city] = country
        self.upstream.list_cities(dict(sorted(cities.items())), self.loop.now_s)

    def break_list(self, seconds: float) -> None:
        """Let the list of cities fail for a time."""
        self.upstream.list_cities(None, self.loop.now_s)
        self.loop.call_later(seconds, self._restore_list)

    def _restore_list(self) -> None:
        if self.upstream.cities is None:
            self.upstream.list_cities(self._last_list(), self.loop.now_s)

    def _last_list(self) -> dict[int, str]:
        return next(one.value for one in reversed(self.upstream.lists) if isinstance(one.value, dict))

    # Faults. All of them end after the last step.

    def wait(self) -> None:
        """Do nothing at this time."""

    def store_down(self, seconds: float) -> None:
        """Let the bucket refuse all calls."""
        self.store_down_until_s = self.loop.now_s + seconds

    def kafka_down(self, seconds: float) -> None:
        """Stop the brokers."""
        self.kafka.down_until_s = self.loop.now_s + seconds

    def upstream_down(self, seconds: float) -> None:
        """Let the upstream refuse connections."""
        self.upstream.down_until_s = self.loop.now_s + seconds

    def upstream_fails(self, seconds: float) -> None:
        """Let the upstream return 500."""
        self.upstream.failing_until_s = self.loop.now_s + seconds

    def upstream_trickles(self, seconds: float) -> None:
        """Let the downloads that begin within some seconds have no end."""
        self.upstream.trickling_until_s = self.loop.now_s + seconds

    def unlucky(self, seconds: float, share: float) -> None:
        """Let a share of the calls fail in each way."""
        self._unlucky_until_s = self.loop.now_s + seconds
        self._unlucky_share = share

    def store_slow(self, seconds: float, usual_s: float) -> None:
        """Let each call to the bucket take long, a few of them a minute."""
        self._store_slow_until_s = self.loop.now_s + seconds
        self._store_wait_usual_s = usual_s

    def store_far(self, seconds: float) -> None:
        """Let each call to the bucket take ``seconds``, until the end of the simulation."""
        self._store_far_s = seconds

    def slow(self, seconds: float, times: float) -> None:
        """Let all calls take many times as long."""
        self._slow_until_s = self.loop.now_s + seconds
        self._slow_times = times

    def kill(self, name: str, away_s: float) -> None:
        """Kill a process, and start it again later."""
        process = self._processes.get(name)
        if process is not None and not process.dead:
            process.dead = True
            self._supervise(self._killed(name, process, away_s))

    async def _killed(self, name: str, process: Process, away_s: float) -> None:
        await process.kill()
        await asyncio.sleep(away_s)
        self._start_process(name)

    def stop(self, name: str, away_s: float) -> None:
        """Stop a process, and start it again later."""
        process = self._processes.pop(name, None)
        if process is not None and not process.dead:
            self._supervise(self._stopped(name, process, away_s))
        elif process is not None:
            self._processes[name] = process

    async def _stopped(self, name: str, process: Process, away_s: float) -> None:
        await process.stop()
        await asyncio.sleep(away_s)
        self._start_process(name)

    def _supervise(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.Task(work, loop=self.loop)  # it belongs to no process
        self._users.add(task)
        task.add_done_callback(self._users.discard)

    def pause(self, name: str, seconds: float) -> None:
        """Pause a process."""
        process = self._processes.get(name)
        if process is not None:
            process.paused_until_s = self.loop.now_s + seconds
            self._paused += 1

    def suspend(self, name: str, seconds: float) -> None:
        """Suspend the host of a process."""
        process = self._processes.get(name)
        if process is not None:
            process.suspend(seconds)
            self._paused += 1

    def _suspended_s(self, name: str) -> float:
        return self._started[name].suspended_s if name in self._started else 0.0

    def cut_off(self, name: str, seconds: float) -> None:
        """Cut a process off from Kafka."""
        process = self._processes.get(name)
        if process is not None:
            process.cut_off_until_s = self.loop.now_s + seconds

    def redeliver(self, records: int) -> None:
        """Move committed offsets back, as after commits that failed."""
        for group in self.kafka.groups.values():
            for partition, offset in group.committed.items():
                group.committed[partition] = max(0, offset - records)

    def compact(self) -> None:
        """Compact the compacted topics."""
        for topic in (Topic.CITY_STATS, Topic.COUNTRY_DAY_SUMMARIES):
            self.kafka.log.compact(topic)

    def append_undecodable(self, topic: str, seconds: float) -> None:
        """Append a record that the Kafka client cannot decode; an operator skips it after some seconds."""
        self._undecodable += 1
        key = f"{DATES[0]}/undecodable/{self._undecodable}".encode()
        record = self.kafka.append(Topic(topic), key, b"{}", [(BAD_HEADER, b"")])
        self._spawn(partial(self._skip, record, seconds))

    async def _skip(self, record: ConsumedRecord, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while True:
            with contextlib.suppress(DependencyUnavailable):
                await mark(SimulatedStore(self._api), record, self.clock())
                break
            await asyncio.sleep(5)

    # Checks at rest.

    def _wrong_at_rest(self) -> list[str]:
        wrong = checks.summaries_against_manifests(self) + checks.raw_objects_against_manifests(self)
        wrong += checks.topics_against_the_bucket(self, dead_letters=self._undecodable)
        wrong += self._failed_without_a_cause()
        for date in DATES:
            wrong += self._against_the_upstream(date)
            wrong += self._against_the_statuses(date)
        return wrong

    def _failed_without_a_cause(self) -> list[str]:
        """Name the cities that failed for a reason that no step explains."""
        ends = (event for event in checks.decoded(self, Topic.REQUEST_PROGRESS) if isinstance(event, CityFinished))
        reasons = {f"{end.date}/{end.city_id}: {end.reason}" for end in ends if end.outcome is Outcome.FAILED}
        return [
            f"{reason} and no step of {sorted(self._taken)} explains it"
            for reason in sorted(reasons)
            if not any(cause in reason and steps & self._taken for cause, steps in CAUSES.items())
        ]

    def _against_the_statuses(self, date: dt.date) -> list[str]:
        cities = self.upstream.cities or {}
        failed = any(not isinstance(self.upstream.file(city, date), tuple) for city in cities)
        expected = Status.COMPLETED_WITH_FAILURES if failed else Status.COMPLETED
        last = checks.record_of(self, self._last_requests[date])
        found = status_of(last)
        return [] if found is expected else [f"{date}: expected {expected.value}, found {found.value}: {last.failures}"]

    def _against_the_upstream(self, date: dt.date) -> list[str]:
        """Compare what is served with the files. A city without a good file keeps what it had at some time."""
        wrong = []
        cities = self.upstream.cities or {}
        expected = {country.lower(): [0, 0, 0, 0, 0] for country in COUNTRIES}
        for city in CITIES:
            manifest = self._manifest(city, date)
            file = self.upstream.file(city, date)
            since_s = self.loop.now_s if city in cities and isinstance(file, tuple) else 0.0
            contributions = self.upstream.contributions_since(city, date, since_s)
            countries = self.upstream.countries_since(city, since_s)
            if manifest is None:
                if since_s:
                    wrong.append(f"{date}: city {city} has no manifest")
                continue
            if manifest.contribution not in contributions or manifest.country not in countries:
                wrong.append(f"{date}: city {city} expected {contributions} in {countries}, found {manifest}")
            values = (*msgspec.structs.astuple(manifest.contribution), 1)
            expected[manifest.country] = [a + b for a, b in zip(expected[manifest.country], values, strict=True)]
        for country, sums in expected.items():
            summary = self.bucket.live_summary(date, CountrySlug(country))
            found = [*msgspec.structs.astuple(summary.totals), _counted(summary.ledger)] if summary else [0] * 5
            if found != sums:
                wrong.append(f"{date}: {country}: expected {sums}, found {found}")
        return wrong

    def _manifest(self, city: int, date: dt.date) -> Manifest | None:
        key = keys.manifest(date, CityId(str(city)))
        stored = self.bucket.objects.get(key)
        return objects.decode(Manifest, stored.body, key) if stored else None


def _counted(ledger: dict[CityId, objects.LedgerEntry]) -> int:
    return sum(entry.contribution is not None for entry in ledger.values())


def _slugs() -> list[str]:
    return [country.lower() for country in COUNTRIES]
