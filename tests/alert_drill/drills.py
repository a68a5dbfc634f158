"""The drills: a fault each, and the alert that it must raise, or none.

The faults are those of ``tests.chaos``, held until the alert fires, and those that operators meet. A fault that
Tripfold absorbs must raise no alert.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import boto3
import msgspec
from aiokafka import AIOKafkaProducer, TopicPartition

from shared.domain.topics import TOPICS, Topic
from shared.kafka.admin import admin_client
from shared.runtime.settings import PREFIX, load_settings
from tests.alert_drill.running import Deployment
from tests.chaos.faults import REPEATED_TOPICS, append_old_records
from tests.chaos.relay import NetworkState
from tests.chaos.s3_proxy import Fault
from tests.chaos.upstream import UpstreamFault
from tests.fakes.fetching import bad_record, produce

QUIET_DATE = "2024-05-04"
"""Processed before the drills; the load does not request it, so its objects stay as a drill left them."""
NEW_DATE = "2024-05-05"
"""Not processed before its drill: a city that has numbers keeps them when its file is missing."""
DATES = ("2024-05-01", "2024-05-02", "2024-05-03", QUIET_DATE)
REPEATS = 5
NEWER = b'{"type":"city-day-stats","schema_version":99}'

Inject = Callable[[Deployment], AbstractAsyncContextManager[None]]
"""Injects a fault, and ends it when the block ends."""


class Drill(msgspec.Struct, frozen=True, kw_only=True):
    """A fault and the alert that it must raise; None if it must raise none."""

    fault: str
    inject: Inject
    alert: str | None = None
    covers: tuple[Fault | UpstreamFault | NetworkState, ...] = ()


@contextlib.asynccontextmanager
async def nothing(_: Deployment) -> AsyncIterator[None]:
    """Inject no fault."""
    yield


@contextlib.asynccontextmanager
async def stopped(deployment: Deployment, name: str) -> AsyncIterator[None]:
    """Stop a service."""
    await deployment.stop(name)
    try:
        yield
    finally:
        await deployment.start(name)


@contextlib.asynccontextmanager
async def killed(deployment: Deployment) -> AsyncIterator[None]:
    """Kill each service and the S3 store once; each is started again."""
    for name in deployment.system.config.services:
        deployment.kill(name)
    deployment.system.supervisor.kill("s3")
    yield


@contextlib.asynccontextmanager
async def paused(deployment: Deployment, name: str) -> AsyncIterator[None]:
    """Pause a service."""
    deployment.kill(name, signal.SIGSTOP)
    try:
        yield
    finally:
        deployment.kill(name, signal.SIGCONT)


@contextlib.asynccontextmanager
async def disconnected(deployment: Deployment, state: NetworkState) -> AsyncIterator[None]:
    """Disconnect the services from Kafka."""
    await deployment.system.network.set_state(state)
    try:
        yield
    finally:
        await deployment.system.network.set_state(NetworkState.OPEN)


@contextlib.asynccontextmanager
async def broker_killed(deployment: Deployment) -> AsyncIterator[None]:
    """Kill Kafka's broker; the embedded one cannot stay down, so its network goes down."""
    brokers = deployment.system.brokers
    if not brokers:
        async with disconnected(deployment, NetworkState.DOWN):
            yield
        return
    await asyncio.to_thread(brokers[0].kill)
    try:
        yield
    finally:
        await asyncio.to_thread(brokers[0].start)


@contextlib.asynccontextmanager
async def repeated(deployment: Deployment) -> AsyncIterator[None]:
    """Append old records to each topic again, some without headers."""
    for topic in REPEATED_TOPICS:
        for number in range(REPEATS):
            await append_old_records(deployment.system, topic, number / REPEATS, bare=number % 2 == 0)
    yield


@contextlib.asynccontextmanager
async def s3_down(deployment: Deployment) -> AsyncIterator[None]:
    """Reset each connection to S3."""
    deployment.system.s3.down = True
    try:
        yield
    finally:
        deployment.system.s3.down = False


@contextlib.asynccontextmanager
async def failing(deployment: Deployment, rates: dict[Fault | UpstreamFault, float]) -> AsyncIterator[None]:
    """Inject faults into requests to S3 and to the upstream, each into the given share of the requests."""
    system = deployment.system
    system.s3.rates = {fault: rate for fault, rate in rates.items() if isinstance(fault, Fault)}
    system.upstream.rates = {fault: rate for fault, rate in rates.items() if isinstance(fault, UpstreamFault)}
    try:
        yield
    finally:
        system.s3.rates, system.upstream.rates = {}, {}


@contextlib.asynccontextmanager
async def upstream_down(deployment: Deployment) -> AsyncIterator[None]:
    """Refuse each connection to the upstream."""
    await deployment.system.upstream.set_down(True)
    try:
        yield
    finally:
        await deployment.system.upstream.set_down(False)


@contextlib.asynccontextmanager
async def file_missing(deployment: Deployment) -> AsyncIterator[None]:
    """Process a date while the file of a city is missing, then leave the deployment without load."""
    deployment.busy.clear()
    deployment.system.upstream.withdraw(0, NEW_DATE)
    await deployment.request(NEW_DATE)
    try:
        yield
    finally:
        deployment.system.upstream.publish(0, NEW_DATE)
        await deployment.request(NEW_DATE)
        deployment.busy.set()


@contextlib.asynccontextmanager
async def poison(deployment: Deployment) -> AsyncIterator[None]:
    """Publish a record that no version can read."""
    await _publish(deployment, Topic.CITY_TASKS, b"{")
    yield


@contextlib.asynccontextmanager
async def newer(deployment: Deployment) -> AsyncIterator[None]:
    """Publish a record of a later schema version; skip it at the end."""
    partition, offset = await _publish(deployment, Topic.CITY_STATS, NEWER)
    try:
        yield
    finally:
        await _run(deployment, "skip", Topic.CITY_STATS.value, str(partition), str(offset))


@contextlib.asynccontextmanager
async def undecodable(deployment: Deployment) -> AsyncIterator[None]:
    """Publish a record that the Kafka client cannot decode; skip it at the end."""
    topic, system = Topic.CITY_STATS, deployment.system
    name = system.environment[f"{PREFIX}TOPIC_PREFIX"] + topic.value
    offset = await produce(system.kafka_address, TopicPartition(name, 0), [bad_record(topic)])
    try:
        yield
    finally:
        await _run(deployment, "skip", topic.value, "0", str(offset))


@contextlib.asynccontextmanager
async def damaged_summary(deployment: Deployment) -> AsyncIterator[None]:
    """Overwrite a summary; repair it at the end."""
    client, bucket = _store(deployment)
    key = await asyncio.to_thread(_find, client, bucket, f"date={QUIET_DATE}/country=", "summaries/")
    await asyncio.to_thread(client.put_object, Bucket=bucket, Key=key, Body=b"{")
    try:
        yield
    finally:
        await _run(deployment, "repair", "--from", QUIET_DATE, "--to", QUIET_DATE)


@contextlib.asynccontextmanager
async def lost_raw_object(deployment: Deployment) -> AsyncIterator[None]:
    """Delete a raw object, and verify; put it back at the end."""
    client, bucket = _store(deployment)
    key = await asyncio.to_thread(_find, client, bucket, "", f"raw/date={QUIET_DATE}/")
    body = await asyncio.to_thread(_take, client, bucket, key)
    await deployment.verify()
    try:
        yield
    finally:
        await asyncio.to_thread(client.put_object, Bucket=bucket, Key=key, Body=body)
        await deployment.verify()


@contextlib.asynccontextmanager
async def deleted_summary(deployment: Deployment) -> AsyncIterator[None]:
    """Delete a summary, and verify; repair it at the end."""
    client, bucket = _store(deployment)
    key = await asyncio.to_thread(_find, client, bucket, f"date={QUIET_DATE}/country=", "summaries/")
    await asyncio.to_thread(client.delete_object, Bucket=bucket, Key=key)
    await deployment.verify()
    try:
        yield
    finally:
        await _run(deployment, "repair", "--from", QUIET_DATE, "--to", QUIET_DATE)
        await deployment.verify()


@contextlib.asynccontextmanager
async def wiped_kafka(deployment: Deployment) -> AsyncIterator[None]:
    """Delete all topics; make them again at the end, and fill them from the bucket."""
    settings = load_settings(deployment.system.environment)
    async with admin_client(settings) as client:
        await client.delete_topics([spec.name(settings.topic_prefix) for spec in TOPICS])
    try:
        yield
    finally:
        await _run(deployment, "topics", "apply")
        await _run(deployment, "republish")


async def _publish(deployment: Deployment, topic: Topic, value: bytes) -> tuple[int, int]:
    """Publish a record; return its partition and offset."""
    system = deployment.system
    producer = AIOKafkaProducer(bootstrap_servers=system.kafka_address, acks="all")
    await producer.start()
    try:
        name = system.environment[f"{PREFIX}TOPIC_PREFIX"] + topic.value
        sent = await producer.send_and_wait(name, value, f"{QUIET_DATE}/drill/1".encode())
        return sent.partition, sent.offset
    finally:
        await producer.stop()


async def _run(deployment: Deployment, *arguments: str) -> None:
    """Run a ``tripfold`` command; fail with its output if it fails."""
    code, output = await deployment.system.command(*arguments)
    assert code == 0, f"tripfold {' '.join(arguments)} ended with {code}: {output}"


def _store(deployment: Deployment) -> tuple[Any, str]:
    environment = deployment.system.environment
    client = boto3.client(
        "s3",
        endpoint_url=deployment.system.store_url,
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    return client, environment[f"{PREFIX}S3_BUCKET"]


def _find(client: Any, bucket: str, text: str, prefix: str) -> str:
    """Return the first key under ``prefix`` with ``text`` in it."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return next(str(one["Key"]) for page in pages for one in page["Contents"] if text in one["Key"])


def _take(client: Any, bucket: str, key: str) -> bytes:
    """Delete an object; return what it was."""
    body: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.delete_object(Bucket=bucket, Key=key)
    return body


def _failing(alert: str | None, rate: float, *faults: Fault | UpstreamFault) -> Drill:
    return Drill(
        fault=", ".join(fault.value for fault in faults),
        inject=partial(failing, rates=dict.fromkeys(faults, rate)),
        alert=alert,
        covers=faults,
    )


DRILLS = (
    Drill(fault="none, under load", inject=nothing),
    Drill(fault="all services and S3 killed and restarted", inject=killed),
    Drill(fault="old records appended again", inject=repeated),
    _failing(None, 0.05, Fault.CONFLICT_409, Fault.ERROR_412_AFTER_APPLYING),
    _failing(None, 0.05, UpstreamFault.TRUNCATED, UpstreamFault.STALLED, UpstreamFault.SLOW),
    Drill(fault="API stopped", inject=partial(stopped, name="api"), alert="TripfoldProcessMissing"),
    Drill(fault="planner stopped", inject=partial(stopped, name="planner"), alert="TripfoldProcessMissing"),
    Drill(fault="worker stopped", inject=partial(stopped, name="worker-1"), alert="TripfoldProcessMissing"),
    Drill(fault="aggregate stopped", inject=partial(stopped, name="aggregate-1"), alert="TripfoldProcessMissing"),
    Drill(fault="worker paused", inject=partial(paused, name="worker-1"), alert="TripfoldProcessMissing"),
    *(
        Drill(
            fault=f"Kafka {state.value}",
            inject=partial(disconnected, state=state),
            alert="TripfoldServiceDown",
            covers=(state,),
        )
        for state in (NetworkState.DOWN, NetworkState.BLACKHOLED)
    ),
    Drill(fault="Kafka's broker killed", inject=broker_killed, alert="TripfoldServiceDown"),
    Drill(fault="S3 down", inject=s3_down, alert="TripfoldServiceDown"),
    _failing("TripfoldServiceDown", 1, Fault.FORBIDDEN_403),
    _failing("TripfoldApiErrorsFast", 0.5, Fault.ERROR_503, Fault.ERROR_500, Fault.RESET_BEFORE_APPLYING),
    _failing("TripfoldApiErrorsFast", 0.9, Fault.RESET_MID_REQUEST, Fault.RESET_AFTER_APPLYING),
    _failing("TripfoldApiErrorsFast", 1, Fault.ERROR_500_AFTER_APPLYING),
    _failing("TripfoldApiErrorsFast", 1, Fault.ETAG_MISSING),
    _failing("TripfoldApiErrorsFast", 1, Fault.RESPONSE_TRUNCATED),
    _failing("TripfoldServiceDown", 1, Fault.DELAYED),
    Drill(fault="upstream down", inject=upstream_down, alert="TripfoldUpstreamUnreachable"),
    _failing("TripfoldUpstreamFailing", 1, UpstreamFault.RESET),
    _failing("TripfoldUpstreamFailing", 1, UpstreamFault.ERROR_500, UpstreamFault.BUSY_503),
    Drill(
        fault="a date lacks a file",
        inject=file_missing,
        alert="TripfoldIncompleteDays",
        covers=(UpstreamFault.NOT_FOUND,),
    ),
    _failing("TripfoldQuarantinedFiles", 0.3, UpstreamFault.DAMAGED),
    _failing("TripfoldQuarantinedFiles", 0.3, UpstreamFault.HTML_PAGE),
    Drill(fault="poison record", inject=poison, alert="TripfoldDeadLetters"),
    Drill(fault="record of a newer schema version", inject=newer, alert="TripfoldServiceDown"),
    Drill(fault="record that cannot be decoded", inject=undecodable, alert="TripfoldPartitionBlocked"),
    Drill(fault="summary damaged", inject=damaged_summary, alert="TripfoldUnreadableObjects"),
    Drill(fault="summary deleted", inject=deleted_summary, alert="TripfoldVerifyDifferences"),
    Drill(fault="raw object lost", inject=lost_raw_object, alert="TripfoldVerifyDifferences"),
    Drill(fault="all topics deleted", inject=wiped_kafka, alert="TripfoldServiceDown"),
)
