"""The faults of a chaos campaign. Each kind has its own loop, so faults overlap."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from shared.domain.topics import GROUPS, TOPICS, Topic, TopicSpec
from shared.kafka.admin import admin_client
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import PREFIX, load_settings
from tests.chaos.relay import NetworkState
from tests.chaos.report import RECOVERY_DEADLINE_S, CampaignReport
from tests.chaos.s3_proxy import Fault
from tests.chaos.system import KILL_AFTER_S, PARTITIONS, System
from tests.chaos.upstream import UpstreamFault
from tripfold.local.supervisor import ChildEvent, EventKind

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
CLOCK_JUMPS_S = (-3600, -300, -30, 30, 300, 3600)
SLOW_WRITE_S = 2.0
REPEATED_TOPICS = tuple(topic.value for topic in GROUPS)
REPEATED_RECORDS_MAX = 40
REPEAT_DEADLINE_S = 10.0
REPAIR_DEADLINE_S = 900.0
DELETED_TOPICS = tuple(spec for spec in TOPICS if spec.topic is not Topic.DEAD_LETTERS)
COMPACTED_TOPICS = frozenset({Topic.CITY_STATS, Topic.COUNTRY_DAY_SUMMARIES})


class Faults:
    """Injects faults into a system, and measures in the report how long it takes to recover from each.

    ``seconds`` is the length of the campaign, on which the longest outage depends, up to ``outage_s_max``. ``pace``
    multiplies the pauses between faults, and the time in which a service must exit.
    """

    def __init__(
        self,
        system: System,
        report: CampaignReport,
        draw: random.Random,
        *,
        seconds: float,
        outage_s_max: float,
        pace: float,
        say: Callable[[str], None],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._system = system
        self._report = report
        self._draw = draw
        self._longest_outage_s = min(outage_s_max, max(2.0, seconds * LONGEST_OUTAGE_SHARE))
        self._pace = pace
        self._say = say
        self._stops: dict[str, deque[float]] = {name: deque() for name in system.config.services}
        self._background: set[asyncio.Task[None]] = set()
        self._terminating: dict[str, float] = {}
        self._paused: set[str] = set()
        self._repairs = asyncio.Lock()
        self._repair: asyncio.Task[None] | None = None
        system.listeners.append(self._on_event)

    def _on_event(self, event: ChildEvent) -> None:
        """Record how long a service took to exit after SIGTERM."""
        if event.kind is EventKind.ENDED and event.name in self._terminating:
            self._report.sigterm_s.append(round(time.monotonic() - self._terminating.pop(event.name), 2))

    def loops(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """Return a loop for each kind of fault that the system allows."""
        config, kafka = self._system.config, self._system.brokers
        return (
            self._loop(self._stop_a_service, 8.0, first_s=4.0),
            self._loop(self._pause_a_service, 12.0, first_s=7.0),
            self._loop(self._repeat_old_records, 6.0, first_s=9.0),
            self._loop(self._vary_s3, 4.0, first_s=1.0),
            self._loop(self._vary_upstream, 5.0, first_s=1.0),
            self._loop(self._disconnect_kafka, 22.0, first_s=6.0),
            self._loop(self._restart_brokers, 75.0, first_s=14.0),
            self._loop(self._stop_s3, 40.0, first_s=10.0),
            self._loop(self._slow_s3, 50.0, first_s=20.0),
            *([self._loop(self._recreate_a_topic, 60.0, first_s=24.0)] if kafka else []),
            *([self._loop(self._replace_a_broker, 120.0, first_s=30.0)] if len(kafka) > 1 else []),
            *([self._loop(self._move_a_clock, 15.0, first_s=8.0)] if config.clock_library else []),
            *([self._loop(self._change_a_build, 20.0, first_s=5.0)] if config.upgrades else []),
        )

    async def _loop(self, inject: Callable[[], Awaitable[None]], mean_pause_s: float, *, first_s: float) -> None:
        await asyncio.sleep(first_s)
        while True:
            await inject()
            await asyncio.sleep(self._draw.uniform(0.5, 1.5) * mean_pause_s * self._pace)

    async def end(self) -> None:
        """End all faults, after the loops, and wait until everything that they stopped runs again."""
        self._system.s3.rates = {}
        self._system.upstream.rates = {}
        if self._repair is not None:
            await self._repair

    async def recovered(self) -> None:
        """Wait until the recovery from each fault is measured."""
        await asyncio.gather(*self._background)

    # Services.

    async def _stop_a_service(self) -> None:
        name = self._draw.choice(self._system.config.services)
        kill = self._draw.random() < 0.6
        if self._may_stop(name) and (self._signal(name, signal.SIGKILL) if kill else self._terminate(name)):
            self._count("service killed with SIGKILL" if kill else "service stopped with SIGTERM", name)
            self._start(self._time_recovery("service stopped", name))

    async def _change_a_build(self) -> None:
        """Stop a service of this build, and start that of the next one, or the other way round."""
        name = self._draw.choice(self._system.config.services)
        if self._may_stop(name):
            what = "service upgraded" if self._system.change_build(name) else "service rolled back"
            self._terminate(name)
            self._count(what, name)
            self._start(self._time_recovery(what, name))

    def _may_stop(self, name: str) -> bool:
        """Return whether a service may be stopped once more; count that stop."""
        most, window_s = STOPS_PER_WINDOW_MAX
        stops = self._stops[name]
        while stops and stops[0] < time.monotonic() - window_s:
            stops.popleft()
        if len(stops) >= most or name in self._terminating or name in self._paused:
            return False
        stops.append(time.monotonic())
        return True

    def _signal(self, name: str, number: signal.Signals) -> bool:
        """Send a signal to a process; return False if it is restarting."""
        try:
            self._system.supervisor.kill(name, number)
        except LookupError:
            return False
        return True

    def _terminate(self, name: str) -> bool:
        if not self._signal(name, signal.SIGTERM):
            return False
        self._terminating[name] = time.monotonic()
        self._start(self._enforce_exit(name, self._system.supervisor.pid(name)))
        return True

    async def _enforce_exit(self, name: str, pid: int) -> None:
        """Report and kill a service that does not exit in time after SIGTERM."""
        deadline_s = KILL_AFTER_S * self._pace
        await asyncio.sleep(deadline_s)
        with contextlib.suppress(LookupError):
            if name in self._terminating and self._system.supervisor.pid(name) == pid:
                self._report.differences.append(f"{name} did not end within {deadline_s:.0f} s of SIGTERM")
                del self._terminating[name]
                self._system.supervisor.kill(name)

    async def _pause_a_service(self) -> None:
        """Pause a service; after more than its session timeout, other members have taken over its partitions."""
        name = self._draw.choice(self._system.config.services)
        seconds = min(self._draw.choice(PAUSES) * self._system.config.session_timeout_s, self._longest_outage_s)
        if name in self._terminating or not self._signal(name, signal.SIGSTOP):
            return
        self._paused.add(name)
        self._count("service paused", f"{name} for {seconds:.1f} s")
        try:
            await asyncio.sleep(seconds)
        finally:
            self._paused.discard(name)
            self._signal(name, signal.SIGCONT)
        self._start(self._time_recovery("service paused", name))

    async def _move_a_clock(self) -> None:
        """Let the clock of a service jump, and jump back."""
        name = self._draw.choice(self._system.config.services)
        move = partial(self._system.move_clock, name)
        await self._outage("clock jumped", move, self._draw.choice(CLOCK_JUMPS_S), 0, name=name)

    # Kafka.

    async def _repeat_old_records(self) -> None:
        """Append old records of a topic to it again, sometimes without their headers."""
        topic = self._draw.choice(REPEATED_TOPICS)
        place, bare = self._draw.random(), self._draw.random() < 0.3
        with contextlib.suppress(KafkaError, OSError, TimeoutError):
            async with asyncio.timeout(REPEAT_DEADLINE_S):
                if await append_old_records(self._system, topic, place, bare=bare):
                    self._count("old records appended again", f"in {topic}")

    async def _disconnect_kafka(self) -> None:
        states = [NetworkState.DOWN, NetworkState.BLACKHOLED] if self._system.brokers else [NetworkState.DOWN]
        network = self._draw.choice(states)
        await self._outage(f"Kafka {network.value}", self._system.network.set_state, network, NetworkState.OPEN)

    async def _restart_brokers(self) -> None:
        """Stop or kill all brokers, or one of several."""
        brokers = self._system.brokers
        if len(brokers) > 1 and self._draw.random() < 0.6:
            brokers = (self._draw.choice(brokers),)
        kill = bool(brokers) and self._draw.random() < 0.5
        which = "one of Kafka's brokers" if len(brokers) < len(self._system.brokers) else "Kafka's brokers"
        what = f"{which} {'killed with SIGKILL' if kill else 'stopped'}"
        await self._repaired(
            what, partial(self._system.restart_kafka, self._outage_s() / 3, kill=kill, brokers=brokers)
        )

    async def _replace_a_broker(self) -> None:
        """Kill a broker, and start it again without its data, once the others have all records."""
        broker = self._draw.choice(self._system.brokers)

        async def replace() -> None:
            await self._until("every replica is in sync", self._system.in_sync)
            await self._system.restart_kafka(self._outage_s() / 3, kill=True, brokers=(broker,), lose_data=True)

        await self._repaired("Kafka's broker replaced", replace)

    async def _recreate_a_topic(self) -> None:
        """Delete a topic, and create it again as docs/how-to/lose-kafka.md says."""
        spec = self._draw.choice(DELETED_TOPICS)
        republish = spec.topic in COMPACTED_TOPICS

        async def recreate() -> None:
            await self._until(f"{spec.topic.value} is deleted", partial(self._delete, spec))
            await asyncio.sleep(self._outage_s() / 3)
            for command in (("topics", "apply"), *([("republish",)] if republish else [])):
                await self._until(f"tripfold {' '.join(command)} succeeds", partial(self._run, *command))

        await self._repaired("topic deleted and created again", recreate, spec.topic.value)

    async def _delete(self, spec: TopicSpec) -> bool:
        settings = load_settings(self._system.environment)
        with contextlib.suppress(KafkaError, OSError, DependencyUnavailable):
            async with admin_client(settings) as client:
                name = spec.name(settings.topic_prefix)
                if name not in await client.list_topics():
                    return True
                await client.delete_topics([name])
        return False

    async def _run(self, *command: str) -> bool:
        with contextlib.suppress(TimeoutError):
            code, _ = await self._system.command(*command)
            return code == 0
        return False

    async def _until(self, what: str, done: Callable[[], Awaitable[bool]]) -> None:
        """Try again until it is done; report a difference if that takes too long."""
        deadline_s = time.monotonic() + REPAIR_DEADLINE_S
        while not await done():
            if time.monotonic() > deadline_s:
                self._report.differences.append(f"waited {REPAIR_DEADLINE_S:.0f} s in vain until {what}")
                return
            await asyncio.sleep(1.0)

    async def _repaired(self, what: str, inject: Callable[[], Coroutine[Any, Any, None]], detail: str = "") -> None:
        """Inject a fault of Kafka that ends by its repair, one at a time. ``end`` waits for the repair."""
        async with self._repairs:
            self._count(what, detail)
            self._repair = self._start(inject())
            await asyncio.shield(self._repair)
        self._start(self._time_recovery(what))

    # S3 and the upstream.

    async def _vary_s3(self) -> None:
        scale = self._draw.choice([0.0, 0.004, 0.004, 0.02, 0.05])
        if self._system.s3.rates and not scale:
            self._start(self._time_recovery("errors of S3"))
        self._system.s3.rates = {fault: min(0.5, weight * scale) for fault, weight in S3_FAULTS} if scale else {}

    async def _stop_s3(self) -> None:
        async def set_down(down: bool) -> None:
            self._system.s3.down = down

        if self._draw.random() < 0.3:
            if self._signal("s3", signal.SIGKILL):
                self._count("S3 killed with SIGKILL")
                await asyncio.sleep(3)
                self._start(self._time_recovery("S3 killed with SIGKILL"))
        else:
            await self._outage("S3 down", set_down, True, False)

    async def _slow_s3(self) -> None:
        async def set_write_s(seconds: float) -> None:
            self._system.s3.write_s = seconds

        await self._outage("disk of S3 slow", set_write_s, SLOW_WRITE_S, 0.0)

    async def _vary_upstream(self) -> None:
        scale = self._draw.choice([0.0, 0.01, 0.03, 0.06])
        if self._system.upstream.rates and not scale:
            self._start(self._time_recovery("errors of the upstream"))
        self._system.upstream.rates = dict.fromkeys(UpstreamFault, scale) if scale else {}

    # Helpers of the faults above.

    async def _outage(
        self, what: str, set_state: Callable[[Any], Awaitable[None]], bad: Any, good: Any, *, name: str | None = None
    ) -> None:
        """Hold a bad state for some time, and measure the recovery, of one service or of all."""
        outage_s = self._outage_s()
        self._count(what, f"for {outage_s:.1f} s {f'in {name} ({bad:+} s)' if name else ''}")
        self._report.outage_s[what] = round(self._report.outage_s.get(what, 0.0) + outage_s, 1)
        try:
            await set_state(bad)
            await asyncio.sleep(outage_s)
        finally:
            await set_state(good)
        self._start(self._time_recovery(what, name))

    def _outage_s(self) -> float:
        # Most outages are short; some have the maximum length.
        if self._draw.random() < 0.15:
            return self._longest_outage_s
        return min(self._longest_outage_s, self._draw.expovariate(1 / 5) + 0.5)

    def _count(self, what: str, detail: str = "") -> None:
        self.counts[what] += 1
        self._say(f"{what} {detail}")

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:  # ``recovered`` raises the exceptions
            self._background.discard(task)

    async def _time_recovery(self, what: str, name: str | None = None) -> None:
        """Measure the time until each service has reported that it is ready, while other faults continue."""
        began_s = time.monotonic()
        await asyncio.sleep(0.5)
        unready = {name} if name else set(self._system.config.services)
        while unready := {one for one in unready if not await self._system.ready(one)}:
            if time.monotonic() - began_s > RECOVERY_DEADLINE_S:
                # A service that is killed repeatedly may never be ready; the final wait requires all to be.
                self._report.recoveries_missed[what] = self._report.recoveries_missed.get(what, 0) + 1
                return
            await asyncio.sleep(0.5)
        self._report.recovery_s.setdefault(what, []).append(round(time.monotonic() - began_s, 1))


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
