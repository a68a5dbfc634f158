"""Chaos: all of Tripfold under load while everything around it fails, at random and by a seed; then the judgement.

The fault model. Services are killed with -9 and asked to end with SIGTERM, and started again; they stand still for less
and for more than their session, and go on with what they knew. Kafka's broker is reset away from its clients, falls
silent, is stopped or killed and started again, and old records come once more at the end of their topics. S3 refuses,
conflicts, breaks off, applies without an answer or with a wrong one, holds requests, is away, is killed. The upstream
errs, breaks off, stalls, damages files and list. Files are corrected and cities move all the while, and dates are
requested without pause.

Then everything works again, and the judgement has two parts. First what the chaos left, with no further request:
every request has ended, no service has anything left to consume, ``tripfold verify --deep`` finds nothing, and so does
a program that shares no code with Tripfold (``tests.chaos.oracle``). Then every date is requested once more, and what
is served has to be the upstream's truth.

The seed repeats what is drawn (victims, faults, pauses, data), not the timing of processes.
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
from tests.chaos.relay import Network
from tests.chaos.s3_proxy import Fault
from tests.chaos.system import KILL_AFTER_S, PARTITIONS, Metrics, Shape, System, context, start_services
from tests.chaos.upstream import Mischief
from tests.integration.running import eventually
from tripfold.local.supervisor import ChildEvent, EventKind

ENDED = frozenset({"completed", "completed with failures", "failed"})
REQUESTS_WAITING_MAX = 10
REST_DEADLINE_S = 300.0
RECOVERY_DEADLINE_S = 300.0
ENDS_WITHIN = (4, 60.0)
"""A supervisor gives a service up that ends more often than five times in a minute: chaos ends it less often."""
LONGEST_OUTAGE_PART = 0.1
"""No outage lasts longer than this part of the whole chaos."""
S3_FAULTS = (
    (Fault.ERROR_503, 3.0),
    (Fault.ERROR_500, 1.0),
    (Fault.CONFLICT_409, 6.0),
    (Fault.BROKEN_BEFORE, 1.0),
    (Fault.BROKEN_WITHIN, 1.0),
    (Fault.BROKEN_AFTER, 3.0),
    (Fault.ERROR_AFTER, 1.0),
    (Fault.PRECONDITION_AFTER, 3.0),
    (Fault.ETAG_LOST, 3.0),
    (Fault.ANSWER_CUT, 1.0),
    (Fault.HELD, 0.5),
)


FREEZES = (0.2, 0.8, 1.6)
"""How long a service stands still, in session timeouts."""
REPEATED_TOPICS = ("process-requests", "city-tasks", "city-task-retries", "city-stats", "request-progress")
REPEATED_RECORDS_MAX = 40
REPEATING_DEADLINE_S = 10.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long the chaos lasts, and on what system."""

    seconds: float
    seed: int
    shape: Shape
    outage_s_max: float = 60.0
    say: Callable[[str], None] = lambda _: None


class Report(msgspec.Struct, kw_only=True):
    """What happened, and whether anything is wrong: ``differences`` must be empty.

    ``given_up`` counts the times that no recovery was seen within RECOVERY_DEADLINE_S, other faults going on.
    """

    seconds: float
    seed: int
    broker: str
    began_at: str
    faults: dict[str, int] = {}
    outage_s: dict[str, float] = {}
    requests_accepted: int = 0
    requests_refused: int = 0
    requests_ended: dict[str, int] = {}
    city_days_done: int = 0
    city_days_failed: int = 0
    corrections: int = 0
    moves: int = 0
    city_days_judged: int = 0
    country_days_judged: int = 0
    trips_judged: int = 0
    counters: dict[str, int] = {}
    sigterm_s: list[float] = []
    recovery_s: dict[str, list[float]] = {}
    given_up: dict[str, int] = {}
    rest_s: float = 0.0
    differences: list[str] = []


class Campaign:
    """One chaos on a running system."""

    def __init__(self, plan: Plan, system: System) -> None:
        self.plan = plan
        self.system = system
        self.report = Report(
            seconds=plan.seconds,
            seed=plan.seed,
            broker="embedded" if system.kafka is None else "Apache Kafka",
            began_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        self.faults: Counter[str] = Counter()
        self.metrics = Metrics()
        self.waiting: dict[str, dict[str, Any]] = {}
        self._draw = random.Random(plan.seed)
        self._ends: dict[str, deque[float]] = {name: deque() for name in system.shape.services}
        self._recovering: set[asyncio.Task[None]] = set()
        self._asked_to_end: dict[str, float] = {}
        self._frozen: set[str] = set()
        self._restarting: asyncio.Task[None] | None = None
        self._began_s = time.monotonic()
        system.listeners.append(self._on_event)

    def _on_event(self, event: ChildEvent) -> None:
        """Note when a service that was asked to end has ended."""
        if event.kind is EventKind.ENDED and event.name in self._asked_to_end:
            self.report.sigterm_s.append(round(time.monotonic() - self._asked_to_end.pop(event.name), 2))

    async def run(self) -> Report:
        """Let chaos reign, come to rest, judge."""
        report = self.report
        self._say("chaos begins")
        pursuits: list[asyncio.Task[None]] = [
            asyncio.create_task(pursuit)
            for pursuit in (self._request(), self._follow(), self._change(), self._sample(), *self._troubles())
        ]
        try:
            await self._supervised(asyncio.wait(pursuits, timeout=self.plan.seconds, return_when=FIRST_EXCEPTION))
            for pursuit in pursuits:
                if pursuit.done():
                    pursuit.result()
        finally:
            for pursuit in pursuits:
                pursuit.cancel()
            await asyncio.gather(*pursuits, return_exceptions=True)
        await self._calm_down()
        self._say("everything works again")
        rest_began_s = time.monotonic()
        await self._supervised(self._come_to_rest())
        report.rest_s = round(time.monotonic() - rest_began_s, 1)
        await asyncio.gather(*self._recovering)
        self._say("at rest; judging what the chaos left")
        await self._judge("after the chaos", truth=False)
        self._say("requesting every date once more")
        await self._supervised(self._request_all())
        await self._judge("after one more request of each date", truth=True)
        await self.metrics.sample(self.system)
        for name, count in (
            *self.faults.items(),
            *((fault.value, count) for fault, count in self.system.s3.injected.items()),
            *((mischief.value, count) for mischief, count in self.system.upstream.injected.items()),
        ):
            report.faults[name] = report.faults.get(name, 0) + count
        report.corrections = self.system.upstream.corrections
        report.moves = self.system.upstream.moves
        report.counters = dict(sorted(self.metrics.totals.items()))
        if report.counters.get("tripfold_dead_letters_total"):
            report.differences.append("records were dead-lettered")
        return report

    def _say(self, text: str) -> None:
        self.plan.say(f"{time.monotonic() - self._began_s:6.1f} s  {text}")

    async def _supervised(self, work: Any) -> None:
        """Do ``work`` unless the supervisor gives a service up first."""
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

    # The troubles. Each goes on by itself, so that they overlap.

    def _troubles(self) -> tuple[Coroutine[Any, Any, None], ...]:
        return (
            self._trouble(self._end_a_service, 8.0, first_s=4.0),
            self._trouble(self._freeze_a_service, 12.0, first_s=7.0),
            self._trouble(self._repeat_old_records, 6.0, first_s=9.0),
            self._trouble(self._vary_s3, 4.0, first_s=1.0),
            self._trouble(self._vary_upstream, 5.0, first_s=1.0),
            self._trouble(self._part_from_kafka, 22.0, first_s=6.0),
            self._trouble(self._restart_broker, 75.0, first_s=14.0),
            self._trouble(self._take_s3_away, 40.0, first_s=10.0),
        )

    async def _trouble(self, make: Callable[[], Awaitable[None]], mean_pause_s: float, *, first_s: float) -> None:
        await asyncio.sleep(first_s)
        while True:
            await make()
            await asyncio.sleep(self._draw.uniform(0.5, 1.5) * mean_pause_s)

    async def _end_a_service(self) -> None:
        name = self._draw.choice(self.system.shape.services)
        kill = self._draw.random() < 0.6
        most, window_s = ENDS_WITHIN
        ends = self._ends[name]
        while ends and ends[0] < time.monotonic() - window_s:
            ends.popleft()
        if len(ends) >= most or name in self._asked_to_end or name in self._frozen:
            return
        try:
            self.system.supervisor.pid(name)
        except LookupError:
            return  # it is between two lives
        ends.append(time.monotonic())
        if kill:
            self.system.supervisor.kill(name)
            self._count("service killed with SIGKILL", name)
        else:
            self._asked_to_end[name] = time.monotonic()
            self.system.supervisor.kill(name, signal.SIGTERM)
            self._count("service ended with SIGTERM", name)
            self._start(self._end_for_good(name))
        self._start(self._time_recovery("a service ended", name))

    async def _freeze_a_service(self) -> None:
        """Let a service stand still; longer than its session, it finds that others have done its work."""
        name = self._draw.choice(self.system.shape.services)
        seconds = min(self._draw.choice(FREEZES) * self.plan.shape.session_timeout_s, self._longest_outage_s())
        if name in self._asked_to_end:
            return
        try:
            self.system.supervisor.kill(name, signal.SIGSTOP)
        except LookupError:
            return  # it is between two lives
        self._frozen.add(name)
        self._count("service stood still", f"{name} for {seconds:.1f} s")
        try:
            await asyncio.sleep(seconds)
        finally:
            self._frozen.discard(name)
            with contextlib.suppress(LookupError):
                self.system.supervisor.kill(name, signal.SIGCONT)
        self._start(self._time_recovery("a service stood still", name))

    async def _repeat_old_records(self) -> None:
        """Append records of a topic to it once more, as they came, some without their headers."""
        topic = self._draw.choice(REPEATED_TOPICS)
        place, bare = self._draw.random(), self._draw.random() < 0.3
        with contextlib.suppress(KafkaError, OSError, TimeoutError):
            async with asyncio.timeout(REPEATING_DEADLINE_S):
                if await self._repeat(self.system.environment[f"{PREFIX}TOPIC_PREFIX"] + topic, place, bare=bare):
                    self._count("old records came again", f"in {topic}")

    async def _repeat(self, topic: str, place: float, *, bare: bool) -> int:
        consumer = AIOKafkaConsumer(bootstrap_servers=self.system.kafka_address, request_timeout_ms=5_000)
        producer = AIOKafkaProducer(bootstrap_servers=self.system.kafka_address, request_timeout_ms=5_000, acks="all")
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
                await producer.send_and_wait(
                    topic, record.value, record.key, partition=record.partition, headers=headers
                )
            return len(records)
        finally:
            await asyncio.gather(consumer.stop(), producer.stop(), return_exceptions=True)

    async def _end_for_good(self, name: str) -> None:
        """Kill a service that does not end when it is asked to: it has to."""
        pid = self.system.supervisor.pid(name)
        await asyncio.sleep(KILL_AFTER_S)
        if name in self._asked_to_end and self.system.supervisor.pid(name) == pid:
            self.report.differences.append(f"{name} did not end within {KILL_AFTER_S:.0f} s of SIGTERM")
            del self._asked_to_end[name]
            self.system.supervisor.kill(name)

    async def _vary_s3(self) -> None:
        scale = self._draw.choice([0.0, 0.004, 0.004, 0.02, 0.05])
        self.system.s3.rates = {fault: min(0.5, weight * scale) for fault, weight in S3_FAULTS}

    async def _vary_upstream(self) -> None:
        scale = self._draw.choice([0.0, 0.01, 0.03, 0.06])
        self.system.upstream.rates = dict.fromkeys(Mischief, scale)

    async def _part_from_kafka(self) -> None:
        network = Network.AWAY if self.system.kafka is None else self._draw.choice([Network.AWAY, Network.SILENT])
        await self._outage(f"Kafka {network.value}", self.system.network.become, network, Network.OPEN)

    async def _take_s3_away(self) -> None:
        async def become(away: bool) -> None:
            self.system.s3.away = away

        if self._draw.random() < 0.3:
            self._count("S3 killed with SIGKILL")
            self.system.supervisor.kill("s3")
            await asyncio.sleep(3)
            self._start(self._time_recovery("S3 killed"))
        else:
            await self._outage("S3 away", become, True, False)

    async def _restart_broker(self) -> None:
        kill = self._draw.random() < 0.5
        self._count("Kafka's broker killed with SIGKILL" if kill and self.system.kafka else "Kafka's broker stopped")
        self._restarting = asyncio.create_task(self.system.restart_kafka(self._outage_s() / 3, kill=kill))
        await asyncio.shield(self._restarting)  # once begun it is done, also when the chaos ends meanwhile
        self._start(self._time_recovery("Kafka's broker restarted"))

    async def _outage(self, what: str, become: Callable[[Any], Awaitable[None]], bad: Any, good: Any) -> None:
        outage_s = self._outage_s()
        self._count(what, f"for {outage_s:.1f} s")
        self.report.outage_s[what] = round(self.report.outage_s.get(what, 0.0) + outage_s, 1)
        try:
            await become(bad)
            await asyncio.sleep(outage_s)
        finally:
            await become(good)
        self._start(self._time_recovery(what))

    def _outage_s(self) -> float:
        longest_s = self._longest_outage_s()
        # Most are short, some are as long as they may be.
        return longest_s if self._draw.random() < 0.15 else min(longest_s, self._draw.expovariate(1 / 5) + 0.5)

    def _longest_outage_s(self) -> float:
        return min(self.plan.outage_s_max, max(2.0, self.plan.seconds * LONGEST_OUTAGE_PART))

    def _count(self, what: str, detail: str = "") -> None:
        self.faults[what] += 1
        self._say(f"{what} {detail}")

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)

    async def _time_recovery(self, what: str, name: str | None = None) -> None:
        """Time how long it takes from here until each service has said that it is ready, other troubles going on."""
        began_s = time.monotonic()
        await asyncio.sleep(0.5)
        unready = {name} if name else set(self.system.shape.services)
        while unready := {one for one in unready if not await self.system.ready(one)}:
            if time.monotonic() - began_s > RECOVERY_DEADLINE_S:
                # Killed again and again, a service may never be: that all are ready is asked for when it is over.
                self.report.given_up[what] = self.report.given_up.get(what, 0) + 1
                return
            await asyncio.sleep(0.5)
        self.report.recovery_s.setdefault(what, []).append(round(time.monotonic() - began_s, 1))

    # The load.

    async def _request(self) -> None:
        while True:
            if len(self.waiting) < REQUESTS_WAITING_MAX:
                await self._post(self._draw.choice(self.plan.shape.dates))
            await asyncio.sleep(self._draw.uniform(0.2, 1.5))

    async def _post(self, date: str) -> bool:
        try:
            answer = await self.system.client.post(f"{self.system.api_url}/process-request", params={"date": date})
        except httpx.HTTPError:
            self.report.requests_refused += 1
            return False
        if answer.status_code != 202:
            self.report.requests_refused += 1
            return False
        self.report.requests_accepted += 1
        self.waiting[answer.headers["location"]] = {}
        return True

    async def _posted(self, date: str) -> bool | None:
        return await self._post(date) or None

    async def _follow(self) -> None:
        while True:
            await self._look_at_requests()
            await asyncio.sleep(1.0)

    async def _look_at_requests(self) -> None:
        for place in list(self.waiting):
            with contextlib.suppress(httpx.HTTPError):
                answer = await self.system.client.get(f"{self.system.api_url}{place}")
                if answer.status_code == 404:
                    self.report.differences.append(f"{place} was accepted and is unknown")
                    del self.waiting[place]
                if answer.status_code != 200:
                    continue
                request = self.waiting[place] = answer.json()
                if request["status"] in ENDED:
                    del self.waiting[place]
                    ended = self.report.requests_ended
                    ended[request["status"]] = ended.get(request["status"], 0) + 1
                    counts = request["counts"]
                    self.report.city_days_done += counts["cities_done"]
                    self.report.city_days_failed += counts["cities_failed"]

    async def _change(self) -> None:
        while True:
            await asyncio.sleep(self._draw.uniform(0.2, 1.2))
            self.system.upstream.correct(self._draw.choice(self.plan.shape.dates))
            if self._draw.random() < 0.25:
                self.system.upstream.move()

    async def _sample(self) -> None:
        while True:
            await self.metrics.sample(self.system)
            await asyncio.sleep(2)

    # The end of it.

    async def _calm_down(self) -> None:
        self.system.s3.rates = {}
        self.system.s3.away = False
        self.system.upstream.rates = {}
        await self.system.network.become(Network.OPEN)
        if self._restarting is not None:
            await self._restarting

    async def _come_to_rest(self) -> None:
        deadline_s = time.monotonic() + REST_DEADLINE_S
        while self.waiting or not await self.system.all_ready() or await self._lag():
            if time.monotonic() > deadline_s:
                self.report.differences += [f"{place} did not end: {last}" for place, last in self.waiting.items()]
                self.report.differences.append(f"not at rest {REST_DEADLINE_S:.0f} s after the last fault")
                self.waiting.clear()
                return
            await self._look_at_requests()
            await asyncio.sleep(0.5)

    async def _lag(self) -> int:
        """Count the records that some group has not committed yet."""
        prefix = self.system.environment[f"{PREFIX}TOPIC_PREFIX"]
        groups = {
            "planner": "process-requests",
            "worker": "city-tasks",
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
        for date in self.plan.shape.dates:
            await eventually(partial(self._posted, date), f"a request of {date} to be accepted")
        before = dict(self.report.requests_ended)
        await self._come_to_rest()
        completed = self.report.requests_ended.get("completed", 0) - before.get("completed", 0)
        if completed != len(self.plan.shape.dates):
            self.report.differences.append(f"of {len(self.plan.shape.dates)} last requests {completed} completed")

    async def _judge(self, when: str, *, truth: bool) -> None:
        report = self.report
        code, output = await self.system.command("verify", "--deep", "--json")
        try:
            verified = json.loads(output)
            report.differences += [f"{when}: verify --deep: {one}" for one in verified["differences"]]
        except json.JSONDecodeError:
            report.differences.append(f"{when}: verify --deep ended with {code}: {output[-2000:]}")
        code, output = await self.system.command("quarantine", "list", "--json")
        try:
            refused = json.loads(output)
            report.differences += [f"{when}: a good file is in quarantine: {one}" for one in refused]
        except json.JSONDecodeError:
            report.differences.append(f"{when}: quarantine list ended with {code}: {output[-2000:]}")
        code, output = await self.system.oracle(*self.plan.shape.dates, truth=truth)
        try:
            judged = json.loads(output)
        except json.JSONDecodeError:
            report.differences.append(f"{when}: the oracle ended with {code}: {output[-2000:]}")
            return
        report.differences += [f"{when}: {one}" for one in judged["differences"]]
        report.city_days_judged = judged["city_days"]
        report.country_days_judged = judged["country_days"]
        report.trips_judged = judged["trips"]


async def chaos(plan: Plan, directory: Path) -> Report:
    """Run a system under ``directory``, and a campaign on it; leave no process."""
    async with context(plan.shape, directory) as system:
        plan.say("starting the services")
        await start_services(system)
        await eventually(partial(_all_ready, system), "the services to be ready", deadline_s=RECOVERY_DEADLINE_S)
        return await Campaign(plan, system).run()


async def _all_ready(system: System) -> bool | None:
    return await system.all_ready() or None
