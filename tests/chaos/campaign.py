"""A chaos campaign: run all of Tripfold under load, inject random faults, then check the results.

The fault model:

- Services are killed with SIGKILL, or stopped with SIGTERM, and restarted. They are paused with SIGSTOP for less and
  for more than their session timeout, and continue with stale state.

- Clients lose the connection to Kafka, or it hangs. The broker is stopped or killed and restarted. Old records are
  appended to their topics again.

- S3 returns errors and conflicts, resets connections, delays requests, and is down or killed. It applies requests
  without a response, or with a wrong one.

- The upstream returns errors, resets connections, stalls, and damages files and the list of cities.

Meanwhile files are corrected, cities move between countries, and clients keep requesting dates.

Then all faults end, and the campaign checks the results twice:

1. Without further requests. Every request has ended, no consumer has lag, and ``tripfold verify --deep`` finds no
   difference. Neither does ``tests.chaos.oracle``, which shares no code with Tripfold.

2. After one more request for each date. The API must serve the sums of the upstream's current files.

The seed repeats the random choices (victims, faults, pauses, data), not the timing of processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import random
import signal
import time
from asyncio import FIRST_EXCEPTION
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from shared.runtime.settings import PREFIX
from tests.chaos.relay import NetworkState
from tests.chaos.s3_proxy import Fault
from tests.chaos.system import (
    KILL_AFTER_S,
    PARTITIONS,
    CounterTotals,
    System,
    SystemConfig,
    running_system,
    start_services,
)
from tests.chaos.upstream import UpstreamFault
from tests.integration.running import eventually
from tripfold.local.supervisor import ChildEvent, EventKind

ENDED = frozenset({"completed", "completed with failures", "failed"})
REQUESTS_OPEN_MAX = 10
IDLE_DEADLINE_S = 300.0
RECOVERY_DEADLINE_S = 300.0
STOPS_PER_WINDOW_MAX = (4, 60.0)
"""Stops of a service in so many seconds: the supervisor gives up after more than five restarts in a minute."""
LONGEST_OUTAGE_SHARE = 0.1
"""The longest outage, as a share of the whole campaign."""
S3_FAULTS = (
    (Fault.ERROR_503, 3.0),
    (Fault.ERROR_500, 1.0),
    (Fault.CONFLICT_409, 6.0),
    (Fault.RESET_BEFORE_APPLYING, 1.0),
    (Fault.RESET_MID_REQUEST, 1.0),
    (Fault.RESET_AFTER_APPLYING, 3.0),
    (Fault.ERROR_500_AFTER_APPLYING, 1.0),
    (Fault.ERROR_412_AFTER_APPLYING, 3.0),
    (Fault.ETAG_MISSING, 3.0),
    (Fault.RESPONSE_TRUNCATED, 1.0),
    (Fault.DELAYED, 0.5),
)


PAUSES = (0.2, 0.8, 1.6)
"""The lengths of a service's pause, in session timeouts."""
REPEATED_TOPICS = (
    "process-requests",
    "city-tasks",
    "background-tasks",
    "city-task-retries",
    "city-stats",
    "request-progress",
)
REPEATED_RECORDS_MAX = 40
REPEAT_DEADLINE_S = 10.0


class CampaignConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The length of a campaign, its seed, and its system."""

    seconds: float
    seed: int
    system: SystemConfig
    outage_s_max: float = 60.0
    say: Callable[[str], None] = lambda _: None


class CampaignReport(msgspec.Struct, kw_only=True):
    """The events and the results of a campaign; ``differences`` must be empty.

    ``recoveries_missed`` counts faults after which a service was not ready within RECOVERY_DEADLINE_S, while other
    faults continued.
    """

    seconds: float
    seed: int
    broker: str
    started_at: str
    faults: dict[str, int] = {}
    outage_s: dict[str, float] = {}
    requests_accepted: int = 0
    requests_refused: int = 0
    requests_ended: dict[str, int] = {}
    city_days_done: int = 0
    city_days_failed: int = 0
    corrections: int = 0
    moves: int = 0
    city_days_checked: int = 0
    country_days_checked: int = 0
    trips_checked: int = 0
    counters: dict[str, int] = {}
    sigterm_s: list[float] = []
    recovery_s: dict[str, list[float]] = {}
    recoveries_missed: dict[str, int] = {}
    idle_after_s: float = 0.0
    differences: list[str] = []


class Campaign:
    """Runs a campaign on a running system."""

    def __init__(self, config: CampaignConfig, system: System) -> None:
        self.config = config
        self.system = system
        self.report = CampaignReport(
            seconds=config.seconds,
            seed=config.seed,
            broker="embedded" if system.kafka is None else "Apache Kafka",
            started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        self.faults: Counter[str] = Counter()
        self.metrics = CounterTotals()
        self.open_requests: dict[str, dict[str, Any]] = {}
        self._draw = random.Random(config.seed)
        self._stops: dict[str, deque[float]] = {name: deque() for name in system.config.services}
        self._background: set[asyncio.Task[None]] = set()
        self._terminating: dict[str, float] = {}
        self._paused: set[str] = set()
        self._restarting: asyncio.Task[None] | None = None
        self._started_s = time.monotonic()
        system.listeners.append(self._on_event)

    def _on_event(self, event: ChildEvent) -> None:
        """Record how long a service took to exit after SIGTERM."""
        if event.kind is EventKind.ENDED and event.name in self._terminating:
            self.report.sigterm_s.append(round(time.monotonic() - self._terminating.pop(event.name), 2))

    async def run(self) -> CampaignReport:
        """Inject faults under load, wait until the system is idle, then check the results."""
        report = self.report
        self._say("injecting faults")
        activities = (self._request(), self._follow(), self._change(), self._sample(), *self._fault_loops())
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(activity) for activity in activities]
        try:
            await self._supervised(asyncio.wait(tasks, timeout=self.config.seconds, return_when=FIRST_EXCEPTION))
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._end_faults()
        self._say("all faults have ended")
        faults_ended_s = time.monotonic()
        await self._supervised(self._wait_until_idle())
        report.idle_after_s = round(time.monotonic() - faults_ended_s, 1)
        await asyncio.gather(*self._background)
        self._say("idle; checking the results")
        await self._check("after the faults", truth=False)
        self._say("requesting every date once more")
        await self._supervised(self._request_all())
        await self._check("after one more request of each date", truth=True)
        await self.metrics.sample(self.system)
        for name, count in (
            *self.faults.items(),
            *((fault.value, count) for fault, count in self.system.s3.injected.items()),
            *((fault.value, count) for fault, count in self.system.upstream.injected.items()),
        ):
            report.faults[name] = report.faults.get(name, 0) + count
        report.corrections = self.system.upstream.corrections
        report.moves = self.system.upstream.moves
        report.counters = dict(sorted(self.metrics.totals.items()))
        if report.counters.get("tripfold_dead_letters_total"):
            report.differences.append("records were dead-lettered")
        return report

    def _say(self, text: str) -> None:
        self.config.say(f"{time.monotonic() - self._started_s:6.1f} s  {text}")

    async def _supervised(self, work: Any) -> None:
        """Do ``work``; fail if the supervisor gives up on a service first."""
        task = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(self.system.supervisor.wait())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()
            await task
        finally:
            for one in (task, ended):
                one.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)

    # Each kind of fault has its own loop, so faults overlap.

    def _fault_loops(self) -> tuple[Coroutine[Any, Any, None], ...]:
        return (
            self._fault_loop(self._stop_a_service, 8.0, first_s=4.0),
            self._fault_loop(self._pause_a_service, 12.0, first_s=7.0),
            self._fault_loop(self._repeat_old_records, 6.0, first_s=9.0),
            self._fault_loop(self._vary_s3, 4.0, first_s=1.0),
            self._fault_loop(self._vary_upstream, 5.0, first_s=1.0),
            self._fault_loop(self._disconnect_kafka, 22.0, first_s=6.0),
            self._fault_loop(self._restart_broker, 75.0, first_s=14.0),
            self._fault_loop(self._stop_s3, 40.0, first_s=10.0),
        )

    async def _fault_loop(self, inject: Callable[[], Awaitable[None]], mean_pause_s: float, *, first_s: float) -> None:
        await asyncio.sleep(first_s)
        while True:
            await inject()
            await asyncio.sleep(self._draw.uniform(0.5, 1.5) * mean_pause_s)

    async def _stop_a_service(self) -> None:
        name = self._draw.choice(self.system.config.services)
        kill = self._draw.random() < 0.6
        most, window_s = STOPS_PER_WINDOW_MAX
        stops = self._stops[name]
        while stops and stops[0] < time.monotonic() - window_s:
            stops.popleft()
        if len(stops) >= most or name in self._terminating or name in self._paused:
            return
        try:
            self.system.supervisor.pid(name)
        except LookupError:
            return  # it is restarting
        stops.append(time.monotonic())
        if kill:
            self.system.supervisor.kill(name)
            self._count("service killed with SIGKILL", name)
        else:
            self._terminating[name] = time.monotonic()
            self.system.supervisor.kill(name, signal.SIGTERM)
            self._count("service stopped with SIGTERM", name)
            self._start(self._enforce_exit(name))
        self._start(self._time_recovery("a service stopped", name))

    async def _pause_a_service(self) -> None:
        """Pause a service; after more than its session timeout, other members have taken over its partitions."""
        name = self._draw.choice(self.system.config.services)
        seconds = min(self._draw.choice(PAUSES) * self.config.system.session_timeout_s, self._longest_outage_s())
        if name in self._terminating:
            return
        try:
            self.system.supervisor.kill(name, signal.SIGSTOP)
        except LookupError:
            return  # it is restarting
        self._paused.add(name)
        self._count("service paused", f"{name} for {seconds:.1f} s")
        try:
            await asyncio.sleep(seconds)
        finally:
            self._paused.discard(name)
            with contextlib.suppress(LookupError):
                self.system.supervisor.kill(name, signal.SIGCONT)
        self._start(self._time_recovery("a service paused", name))

    async def _repeat_old_records(self) -> None:
        """Append old records of a topic to it again, sometimes without their headers."""
        topic = self._draw.choice(REPEATED_TOPICS)
        place, bare = self._draw.random(), self._draw.random() < 0.3
        with contextlib.suppress(KafkaError, OSError, TimeoutError):
            async with asyncio.timeout(REPEAT_DEADLINE_S):
                if await append_old_records(self.system, topic, place, bare=bare):
                    self._count("old records appended again", f"in {topic}")

    async def _enforce_exit(self, name: str) -> None:
        """Report and kill a service that does not exit in time after SIGTERM."""
        pid = self.system.supervisor.pid(name)
        await asyncio.sleep(KILL_AFTER_S)
        if name in self._terminating and self.system.supervisor.pid(name) == pid:
            self.report.differences.append(f"{name} did not end within {KILL_AFTER_S:.0f} s of SIGTERM")
            del self._terminating[name]
            self.system.supervisor.kill(name)

    async def _vary_s3(self) -> None:
        scale = self._draw.choice([0.0, 0.004, 0.004, 0.02, 0.05])
        self.system.s3.rates = {fault: min(0.5, weight * scale) for fault, weight in S3_FAULTS}

    async def _vary_upstream(self) -> None:
        scale = self._draw.choice([0.0, 0.01, 0.03, 0.06])
        self.system.upstream.rates = dict.fromkeys(UpstreamFault, scale)

    async def _disconnect_kafka(self) -> None:
        embedded = self.system.kafka is None
        network = NetworkState.DOWN if embedded else self._draw.choice([NetworkState.DOWN, NetworkState.BLACKHOLED])
        await self._outage(f"Kafka {network.value}", self.system.network.set_state, network, NetworkState.OPEN)

    async def _stop_s3(self) -> None:
        async def set_down(down: bool) -> None:
            self.system.s3.down = down

        if self._draw.random() < 0.3:
            self._count("S3 killed with SIGKILL")
            self.system.supervisor.kill("s3")
            await asyncio.sleep(3)
            self._start(self._time_recovery("S3 killed"))
        else:
            await self._outage("S3 down", set_down, True, False)

    async def _restart_broker(self) -> None:
        kill = self._draw.random() < 0.5
        self._count("Kafka's broker killed with SIGKILL" if kill and self.system.kafka else "Kafka's broker stopped")
        self._restarting = asyncio.create_task(self.system.restart_kafka(self._outage_s() / 3, kill=kill))
        await asyncio.shield(self._restarting)  # finish the restart also when the faults end meanwhile
        self._start(self._time_recovery("Kafka's broker restarted"))

    async def _outage(self, what: str, set_state: Callable[[Any], Awaitable[None]], bad: Any, good: Any) -> None:
        outage_s = self._outage_s()
        self._count(what, f"for {outage_s:.1f} s")
        self.report.outage_s[what] = round(self.report.outage_s.get(what, 0.0) + outage_s, 1)
        try:
            await set_state(bad)
            await asyncio.sleep(outage_s)
        finally:
            await set_state(good)
        self._start(self._time_recovery(what))

    def _outage_s(self) -> float:
        longest_s = self._longest_outage_s()
        # Most outages are short; some have the maximum length.
        return longest_s if self._draw.random() < 0.15 else min(longest_s, self._draw.expovariate(1 / 5) + 0.5)

    def _longest_outage_s(self) -> float:
        return min(self.config.outage_s_max, max(2.0, self.config.seconds * LONGEST_OUTAGE_SHARE))

    def _count(self, what: str, detail: str = "") -> None:
        self.faults[what] += 1
        self._say(f"{what} {detail}")

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _time_recovery(self, what: str, name: str | None = None) -> None:
        """Measure the time until each service has reported that it is ready, while other faults continue."""
        began_s = time.monotonic()
        await asyncio.sleep(0.5)
        unready = {name} if name else set(self.system.config.services)
        while unready := {one for one in unready if not await self.system.ready(one)}:
            if time.monotonic() - began_s > RECOVERY_DEADLINE_S:
                # A service that is killed repeatedly may never be ready; the final wait requires all to be.
                self.report.recoveries_missed[what] = self.report.recoveries_missed.get(what, 0) + 1
                return
            await asyncio.sleep(0.5)
        self.report.recovery_s.setdefault(what, []).append(round(time.monotonic() - began_s, 1))

    # The load.

    async def _request(self) -> None:
        while True:
            if len(self.open_requests) < REQUESTS_OPEN_MAX:
                await self._post(self._draw.choice(self.config.system.dates))
            await asyncio.sleep(self._draw.uniform(0.2, 1.5))

    async def _post(self, date: str) -> bool:
        try:
            response = await self.system.client.post(f"{self.system.api_url}/process-request", params={"date": date})
        except httpx.HTTPError:
            self.report.requests_refused += 1
            return False
        if response.status_code != 202:
            self.report.requests_refused += 1
            return False
        self.report.requests_accepted += 1
        self.open_requests[response.headers["location"]] = {}
        return True

    async def _try_post(self, date: str) -> bool | None:
        return await self._post(date) or None

    async def _follow(self) -> None:
        while True:
            await self._update_requests()
            await asyncio.sleep(1.0)

    async def _update_requests(self) -> None:
        for location in list(self.open_requests):
            with contextlib.suppress(httpx.HTTPError):
                response = await self.system.client.get(f"{self.system.api_url}{location}")
                if response.status_code == 404:
                    self.report.differences.append(f"{location} was accepted but the API does not know it")
                    del self.open_requests[location]
                if response.status_code != 200:
                    continue
                request = self.open_requests[location] = response.json()
                if request["status"] in ENDED:
                    del self.open_requests[location]
                    ended = self.report.requests_ended
                    ended[request["status"]] = ended.get(request["status"], 0) + 1
                    counts = request["counts"]
                    self.report.city_days_done += counts["cities_done"]
                    self.report.city_days_failed += counts["cities_failed"]

    async def _change(self) -> None:
        while True:
            await asyncio.sleep(self._draw.uniform(0.2, 1.2))
            self.system.upstream.correct(self._draw.choice(self.config.system.dates))
            if self._draw.random() < 0.25:
                self.system.upstream.move()

    async def _sample(self) -> None:
        while True:
            await self.metrics.sample(self.system)
            await asyncio.sleep(2)

    # Ending the faults, and checking the results.

    async def _end_faults(self) -> None:
        self.system.s3.rates = {}
        self.system.s3.down = False
        self.system.upstream.rates = {}
        await self.system.network.set_state(NetworkState.OPEN)
        if self._restarting is not None:
            await self._restarting

    async def _wait_until_idle(self) -> None:
        deadline_s = time.monotonic() + IDLE_DEADLINE_S
        while self.open_requests or not await self.system.all_ready() or await self._lag():
            if time.monotonic() > deadline_s:
                self.report.differences += [
                    f"{location} did not end: {last}" for location, last in self.open_requests.items()
                ]
                self.report.differences.append(f"not idle {IDLE_DEADLINE_S:.0f} s after the last fault")
                self.open_requests.clear()
                return
            await self._update_requests()
            await asyncio.sleep(0.5)

    async def _lag(self) -> int:
        """Return the total lag of all consumer groups."""
        prefix = self.system.environment[f"{PREFIX}TOPIC_PREFIX"]
        groups = {
            "planner": "process-requests",
            "worker": "city-tasks",
            "worker-background": "background-tasks",
            "worker-retries": "city-task-retries",
            "aggregate": "city-stats",
            "progress": "request-progress",
        }
        admin = AIOKafkaAdminClient(bootstrap_servers=self.system.kafka_address)
        consumer = AIOKafkaConsumer(bootstrap_servers=self.system.kafka_address)
        lag = 0
        try:
            await admin.start()
            await consumer.start()
            for group, topic in groups.items():
                partitions = [TopicPartition(prefix + topic, number) for number in range(PARTITIONS)]
                ends = await consumer.end_offsets(partitions)
                committed = await admin.list_consumer_group_offsets(f"{prefix}tripfold-{group}")
                lag += sum(
                    max(0, end - max(0, committed[partition].offset if partition in committed else 0))
                    for partition, end in ends.items()
                )
        finally:
            await admin.close()
            await consumer.stop()
        return lag

    async def _request_all(self) -> None:
        for date in self.config.system.dates:
            await eventually(partial(self._try_post, date), f"a request of {date} to be accepted")
        before = dict(self.report.requests_ended)
        await self._wait_until_idle()
        completed = self.report.requests_ended.get("completed", 0) - before.get("completed", 0)
        if completed != len(self.config.system.dates):
            self.report.differences.append(f"of {len(self.config.system.dates)} last requests {completed} completed")

    async def _check(self, when: str, *, truth: bool) -> None:
        report = self.report
        code, output = await self.system.command("verify", "--deep", "--json")
        try:
            verified = json.loads(output)
            report.differences += [f"{when}: verify --deep: {one}" for one in verified["differences"]]
        except json.JSONDecodeError:
            report.differences.append(f"{when}: verify --deep ended with {code}: {output[-2000:]}")
        code, output = await self.system.command("quarantine", "list", "--json")
        try:
            quarantined = json.loads(output)
            good = self.system.upstream.digests()  # the upstream damages files too: those belong in quarantine
            found = [one for one in quarantined if one["sha256"] in good]
            report.differences += [f"{when}: a good file is in quarantine: {one}" for one in found]
        except json.JSONDecodeError:
            report.differences.append(f"{when}: quarantine list ended with {code}: {output[-2000:]}")
        code, output = await self.system.oracle(*self.config.system.dates, truth=truth)
        try:
            checked = json.loads(output)
        except json.JSONDecodeError:
            report.differences.append(f"{when}: the oracle ended with {code}: {output[-2000:]}")
            return
        report.differences += [f"{when}: {one}" for one in checked["differences"]]
        report.city_days_checked = checked["city_days"]
        report.country_days_checked = checked["country_days"]
        report.trips_checked = checked["trips"]


async def append_old_records(system: System, topic: str, place: float, *, bare: bool) -> int:
    """Append old records of a partition to it again, ``bare`` without their headers; return how many.

    ``place``, at least 0 and less than 1, selects the partition and the first of the records.
    """
    consumer = AIOKafkaConsumer(bootstrap_servers=system.kafka_address, request_timeout_ms=5_000)
    producer = AIOKafkaProducer(bootstrap_servers=system.kafka_address, request_timeout_ms=5_000, acks="all")
    topic = system.environment[f"{PREFIX}TOPIC_PREFIX"] + topic
    try:
        await consumer.start()
        await producer.start()
        partition = TopicPartition(topic, int(place * PARTITIONS))
        consumer.assign([partition])
        end = (await consumer.end_offsets([partition]))[partition]
        begin = (await consumer.beginning_offsets([partition]))[partition]
        if begin == end:
            return 0
        consumer.seek(partition, begin + int(place * (end - begin)))
        old = await consumer.getmany(timeout_ms=2_000, max_records=REPEATED_RECORDS_MAX)
        records = [record for found in old.values() for record in found]
        for record in records:
            headers = [] if bare else list(record.headers)
            await producer.send_and_wait(topic, record.value, record.key, partition=record.partition, headers=headers)
        return len(records)
    finally:
        await asyncio.gather(consumer.stop(), producer.stop(), return_exceptions=True)


async def run_campaign(config: CampaignConfig, directory: Path) -> CampaignReport:
    """Run a system under ``directory`` and a campaign on it; stop all processes at the end."""
    async with running_system(config.system, directory) as system:
        config.say("starting the services")
        await start_services(system)
        await eventually(partial(_all_ready, system), "the services to be ready", deadline_s=RECOVERY_DEADLINE_S)
        return await Campaign(config, system).run()


async def _all_ready(system: System) -> bool | None:
    return await system.all_ready() or None
