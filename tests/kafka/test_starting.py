"""Services that start before their dependencies wait, report the reason, and then work.

At first the S3 server, the bucket, Kafka and the topics are missing. The test adds them one after the other. Then it
deletes the bucket while the services run, and creates it again.
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
from tests.chaos.relay import NetworkState, Relay
from tests.chaos.s3_proxy import FaultyS3
from tests.chaos.system import System
from tests.integration.running import eventually
from tests.kafka.conftest import Tripfold, joined
from tripfold.local.ports import free_port

NAMES = ("api-late", "planner-late", "worker-late", "aggregate-late")
BUCKET = "late"


class LateDependencies(msgspec.Struct, frozen=True):
    """Services without dependencies, and the proxy and relay that can connect them."""

    tripfold: Tripfold
    s3: FaultyS3
    network: Relay

    async def faults(self, name: str) -> set[str]:
        """Return the reasons why a service is not ready."""
        try:
            response = await self.tripfold.system.client.get(f"{self.tripfold.system.health_urls[name]}/health/ready")
        except httpx.HTTPError:
            return {"it does not respond"}
        body = response.json()
        assert (response.status_code == 200) == (not body["faults"] and body["ready"]), body
        return {f"{dependency}: {reason}" for dependency, reason in body["faults"].items()}

    async def reports(self, name: str, text: str) -> bool | None:
        """Return True once a service reports a reason with ``text``."""
        return any(text in fault for fault in await self.faults(name)) or None

    async def is_ready(self, name: str) -> bool | None:
        """Return True once a service is ready."""
        return not await self.faults(name) or None


@pytest_asyncio.fixture(loop_scope="session")
async def late(system: System) -> AsyncIterator[LateDependencies]:
    """Run one service of each kind behind a closed proxy and a closed relay, without a bucket and topics."""
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultyS3(int(system.store_url.rpartition(":")[2])))
        proxy.down = True
        relay = await stack.enter_async_context(Relay(system.brokers[0].port))
        await relay.set_state(NetworkState.DOWN)
        ports = {name: free_port(name) for name in NAMES}
        changed = {
            f"{PREFIX}S3_ENDPOINT_URL": proxy.url,
            f"{PREFIX}S3_BUCKET": BUCKET,
            f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{relay.port}",
            f"{PREFIX}TOPIC_PREFIX": "late.",
        }
        separate = msgspec.structs.replace(
            system,
            environment=system.environment | changed,
            health_urls={"api": f"http://127.0.0.1:{ports['api-late']}"},
            config=msgspec.structs.replace(system.config, services=NAMES),
        )
        for name in NAMES:
            port = {"API_PORT": str(ports[name]), "HEALTH_PORT": str(ports[name])}
            await stack.enter_async_context(joined(separate, name, ready=False, **port))
            separate.health_urls[name] = f"http://127.0.0.1:{ports[name]}"
        yield LateDependencies(Tripfold(separate), proxy, relay)


async def test_start_order_does_not_matter(late: LateDependencies) -> None:
    """Each service waits for its missing dependencies, reports them, and works once they are there."""
    system, tripfold = late.tripfold.system, late.tripfold
    store = boto3.resource(
        "s3", endpoint_url=system.store_url, config=Config(s3={"addressing_style": "path"}), **keys(system)
    )
    for name in NAMES:
        await eventually(partial(late.reports, name, "s3: "), f"{name} to miss S3")
    late.s3.down = False
    for name in NAMES:
        await eventually(partial(late.reports, name, "Not Found"), f"{name} to miss the bucket")
    store.Bucket(BUCKET).create()
    for name in NAMES:
        await eventually(partial(late.reports, name, "kafka: "), f"{name} to miss Kafka")
    await late.network.set_state(NetworkState.OPEN)
    for name in NAMES[1:]:
        await eventually(partial(late.reports, name, "topics apply"), f"{name} to miss its topics")
    await apply_topics(load_settings(system.environment))
    for name in NAMES:
        await eventually(partial(late.is_ready, name), f"{name} to be ready")
    await tripfold.completed(await tripfold.post("2024-05-13"))
    await tripfold.assert_exact("2024-05-13")

    bucket = store.Bucket(BUCKET)
    bucket.objects.all().delete()
    bucket.delete()
    for name in NAMES:
        await eventually(partial(late.reports, name, "Not Found"), f"{name} to miss the deleted bucket")
    bucket.create()
    for name in NAMES:
        await eventually(partial(late.is_ready, name), f"{name} to be ready again")
    await tripfold.completed(await tripfold.post("2024-05-13"))
    await tripfold.assert_exact("2024-05-13")


def keys(system: System) -> dict[str, str]:
    """Return the store's access keys as arguments of boto3."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {name.lower(): system.environment[name] for name in names}
