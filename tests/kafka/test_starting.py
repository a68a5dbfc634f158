"""Services that are started before anything they need is there: they wait, say why, and then work; and again later.

Everything is missing at first: the S3 server, the bucket, Kafka, the topics. It comes piece by piece, in an order that
helps nobody. Then the bucket is deleted under running services, and made again.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial

import boto3
import httpx
import msgspec
import pytest_asyncio
from botocore.config import Config

from shared.kafka.admin import apply_topics
from shared.runtime.settings import PREFIX, load_settings
from tests.chaos.relay import Network, Relay
from tests.chaos.s3_proxy import FaultyS3
from tests.chaos.system import System
from tests.integration.running import eventually
from tests.kafka.conftest import Tripfold, joined
from tripfold.local.ports import free_port

NAMES = ("api-late", "planner-late", "worker-late", "aggregate-late")
BUCKET = "late"


class Late(msgspec.Struct, frozen=True):
    """Services with nothing around them, and the surroundings that can be given to them."""

    tripfold: Tripfold
    s3: FaultyS3
    network: Relay

    async def faults(self, name: str) -> set[str]:
        """Return what a service says is in the way; nothing if it is ready."""
        try:
            answer = await self.tripfold.system.client.get(f"{self.tripfold.system.health_urls[name]}/health/ready")
        except httpx.HTTPError:
            return {"it does not answer"}
        body = answer.json()
        assert (answer.status_code == 200) == (not body["faults"] and body["ready"]), body
        return set() if answer.status_code == 200 else {f"{what}: {why}" for what, why in body["faults"].items()}

    async def says(self, name: str, text: str) -> bool | None:
        """Say True once a service is not ready and names ``text`` as the reason."""
        return any(text in fault for fault in await self.faults(name)) or None

    async def is_ready(self, name: str) -> bool | None:
        """Say True once a service is ready."""
        return not await self.faults(name) or None


@pytest_asyncio.fixture(loop_scope="session")
async def late(system: System) -> AsyncIterator[Late]:
    """Run one service of each kind behind a proxy and a relay of their own, both closed, with no bucket, no topics."""
    assert system.kafka is not None
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultyS3(int(system.store_url.rpartition(":")[2])))
        proxy.away = True
        relay = await stack.enter_async_context(Relay(system.kafka.port))
        await relay.become(Network.AWAY)
        ports = {name: free_port(name) for name in NAMES}
        changed = {
            f"{PREFIX}S3_ENDPOINT_URL": proxy.url,
            f"{PREFIX}S3_BUCKET": BUCKET,
            f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{relay.port}",
            f"{PREFIX}TOPIC_PREFIX": "late.",
        }
        apart = msgspec.structs.replace(
            system,
            environment=system.environment | changed,
            health_urls={"api": f"http://127.0.0.1:{ports['api-late']}"},
            shape=msgspec.structs.replace(system.shape, services=NAMES),
        )
        for name in NAMES:
            port = {"API_PORT": str(ports[name]), "HEALTH_PORT": str(ports[name])}
            await stack.enter_async_context(joined(apart, name, ready=False, **port))
            apart.health_urls[name] = f"http://127.0.0.1:{ports[name]}"
        yield Late(Tripfold(apart), proxy, relay)


async def test_start_order_does_not_matter(late: Late) -> None:
    """Each service waits for what it misses, says what that is, and works once it is there; the bucket included."""
    system, tripfold = late.tripfold.system, late.tripfold
    store = boto3.resource(
        "s3", endpoint_url=system.store_url, config=Config(s3={"addressing_style": "path"}), **keys(system)
    )
    for name in NAMES:
        await eventually(partial(late.says, name, "s3: "), f"{name} to miss S3")
    late.s3.away = False
    for name in NAMES:
        await eventually(partial(late.says, name, "Not Found"), f"{name} to miss the bucket")
    store.Bucket(BUCKET).create()
    for name in NAMES:
        await eventually(partial(late.says, name, "kafka: "), f"{name} to miss Kafka")
    await late.network.become(Network.OPEN)
    for name in NAMES[1:]:
        await eventually(partial(late.says, name, "topics apply"), f"{name} to miss its topics")
    await apply_topics(load_settings(system.environment))
    for name in NAMES:
        await eventually(partial(late.is_ready, name), f"{name} to be ready")
    await tripfold.completed(await tripfold.post("2024-05-13"))
    await tripfold.exact("2024-05-13")

    bucket = store.Bucket(BUCKET)
    bucket.objects.all().delete()
    bucket.delete()
    for name in NAMES:
        await eventually(partial(late.says, name, "Not Found"), f"{name} to miss the deleted bucket")
    bucket.create()
    for name in NAMES:
        await eventually(partial(late.is_ready, name), f"{name} to be ready again")
    await tripfold.completed(await tripfold.post("2024-05-13"))
    await tripfold.exact("2024-05-13")


def keys(system: System) -> dict[str, str]:
    """Return the keys to the store, as boto3 wants them."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {name.lower(): system.environment[name] for name in names}
