"""A chaos campaign: run all of Tripfold under load, inject random faults, then check the results.

The fault model:

- Services are killed with SIGKILL, or stopped with SIGTERM, and restarted. They are paused with SIGSTOP for less and
  for more than their session timeout, and continue with stale state. They are upgraded to the next build and rolled
  back. Their clocks jump.

- Clients lose the connection to Kafka, or it hangs. Brokers are stopped or killed and restarted, and one is replaced by
  an empty one. Topics are deleted and created again. Old records are appended to their topics again.

- S3 returns errors and conflicts, resets connections, delays requests, writes slowly, and is down or killed. It applies
  requests without a response, or with a wrong one.

- The upstream returns errors, resets connections, stalls, and damages files and the list of cities.

Meanwhile files are corrected, cities move between countries, clients keep requesting dates, and a backfill and a
schedule process all of them.

Then all faults end, and the campaign checks the results twice:

1. Without further requests. Every request and backfill has ended, no consumer has lag, and ``tripfold verify --deep``
   finds no difference. Neither does ``tests.chaos.oracle``, which shares no code with Tripfold. It also compares the
   Parquet tables, once ``tripfold lake build`` has built them.

2. After one more request for each date. The API must serve the sums of the upstream's current files.

The seed repeats the random choices (victims, faults, pauses, data), not the timing of processes.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import random
import time
from asyncio import FIRST_EXCEPTION
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from shared.domain.topics import GROUPS, group_id
from shared.runtime.settings import PREFIX
from tests.chaos.faults import Faults
from tests.chaos.load import Load
from tests.chaos.report import RECOVERY_DEADLINE_S, CampaignReport
from tests.chaos.system import PARTITIONS, CounterTotals, System, SystemConfig, running_system, start_services
from tests.integration.running import eventually

IDLE_DEADLINE_S = 600.0


class CampaignConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The length of a campaign, its seed, its system, and how many times longer the pauses between faults are."""

    seconds: float
    seed: int
    system: SystemConfig
    outage_s_max: float = 60.0
    pace: float = 1.0
    say: Callable[[str], None] = lambda _: None


class Campaign:
    """Runs a campaign on a running system."""

    def __init__(self, config: CampaignConfig, system: System) -> None:
        self.config = config
        self.system = system
        self.report = CampaignReport(
            seconds=config.seconds,
            seed=config.seed,
            broker=f"Apache Kafka with {len(system.brokers)} brokers" if system.brokers else "the embedded broker",
            started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        self.metrics = CounterTotals()
        self._started_s = time.monotonic()
        draw = random.Random(config.seed)
        self._load = Load(system, self.report, draw)
        self._faults = Faults(
            system,
            self.report,
            draw,
            seconds=config.seconds,
            outage_s_max=config.outage_s_max,
            pace=config.pace,
            say=self._say,
        )

    async def run(self) -> CampaignReport:
        """Inject faults under load, wait until the system is idle, then check the results."""
        report = self.report
        self._say("injecting faults")
        activities = (*self._load.activities(), self._sample(), *self._faults.loops())
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
        await self._supervised(self._faults.end())
        self._say("all faults have ended")
        faults_ended_s = time.monotonic()
        await self._supervised(self._load.end())
        await self._supervised(self._wait_until_idle())
        report.idle_after_s = round(time.monotonic() - faults_ended_s, 1)
        await self._faults.recovered()
        self._say("idle; checking the results")
        await self._check("after the faults", truth=False)
        self._say("requesting every date once more")
        await self._supervised(self._request_all())
        await self._check("after one more request of each date", truth=True)
        await self.metrics.sample(self.system)
        for name, count in (
            *self._faults.counts.items(),
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

    async def _sample(self) -> None:
        while True:
            await self.metrics.sample(self.system)
            await asyncio.sleep(2)

    # The checks.

    async def _wait_until_idle(self) -> None:
        deadline_s = time.monotonic() + IDLE_DEADLINE_S
        while self._load.open or not await self.system.all_ready() or await self._lag():
            if time.monotonic() > deadline_s:
                self.report.differences += [f"{path} did not end: {last}" for path, last in self._load.open.items()]
                self.report.differences.append(f"not idle {IDLE_DEADLINE_S:.0f} s after the last fault")
                self._load.open.clear()
                return
            await self._load.update()
            await asyncio.sleep(0.5)

    async def _lag(self) -> int:
        """Return the total lag of all consumer groups."""
        prefix = self.system.environment[f"{PREFIX}TOPIC_PREFIX"]
        admin = AIOKafkaAdminClient(bootstrap_servers=self.system.kafka_address)
        consumer = AIOKafkaConsumer(bootstrap_servers=self.system.kafka_address)
        lag = 0
        try:
            await admin.start()
            await consumer.start()
            for topic, group in GROUPS.items():
                partitions = [TopicPartition(prefix + topic.value, number) for number in range(PARTITIONS)]
                ends = await consumer.end_offsets(partitions)
                committed = await admin.list_consumer_group_offsets(group_id(prefix, group))
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
            await eventually(partial(self._load.post, date), f"a request of {date} to be accepted")
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
        code, output = await self.system.command("lake", "build", "--json")
        if code:
            report.differences.append(f"{when}: lake build ended with {code}: {output[-2000:]}")
        code, output = await self.system.oracle(*self.config.system.dates, truth=truth, tables=True)
        try:
            checked = json.loads(output)
        except json.JSONDecodeError:
            report.differences.append(f"{when}: the oracle ended with {code}: {output[-2000:]}")
            return
        report.differences += [f"{when}: {one}" for one in checked["differences"]]
        report.city_days_checked = checked["city_days"]
        report.country_days_checked = checked["country_days"]
        report.trips_checked = checked["trips"]


async def run_campaign(config: CampaignConfig, directory: Path) -> CampaignReport:
    """Run a system under ``directory`` and a campaign on it; stop all processes at the end."""
    async with running_system(config.system, directory) as system:
        config.say("starting the services")
        await start_services(system)
        await eventually(partial(_all_ready, system), "the services to be ready", deadline_s=RECOVERY_DEADLINE_S)
        return await Campaign(config, system).run()


async def _all_ready(system: System) -> bool | None:
    return await system.all_ready() or None
