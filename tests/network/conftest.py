"""Fixtures: Tripfold as processes that use Kafka and S3 through Toxiproxy.

``make test-containers`` runs these tests. It sets the variables without which they are skipped.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from shared.runtime.settings import load_settings
from tests.chaos.upstream import ChaosUpstream
from tests.integration.conftest import KAFKA_VARIABLE, S3_VARIABLE
from tests.integration.running import Running, running
from tests.network.toxiproxy import (
    PROXIED_KAFKA_VARIABLE,
    PROXIED_S3_VARIABLE,
    TOXIPROXY_CONTAINER_VARIABLE,
    TOXIPROXY_VARIABLE,
    Toxiproxy,
    ToxiproxyLog,
)

CITIES = 6
DATES = tuple(f"2024-06-{day:02}" for day in range(1, 31))
PREFIX_OF_TOPICS = "network."
BUCKET_OF_TESTS = "network"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder without Toxiproxy; all of them share one event loop."""
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            if TOXIPROXY_VARIABLE not in os.environ:
                item.add_marker(pytest.mark.skip(reason="needs Toxiproxy: make test-containers"))


class Proxied(msgspec.Struct, frozen=True, kw_only=True):
    """Tripfold behind the proxy, its upstream, the proxy, and the proxy's log."""

    running: Running
    upstream: ChaosUpstream
    toxiproxy: Toxiproxy
    log: ToxiproxyLog
    dates: list[str]

    def fresh_date(self) -> str:
        """Return a date that no other test uses."""
        return self.dates.pop()


@pytest.fixture(scope="session")
def toxiproxy() -> Iterator[Toxiproxy]:
    """Return a client of Toxiproxy's API."""
    with Toxiproxy(os.environ[TOXIPROXY_VARIABLE]) as toxiproxy:
        yield toxiproxy


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def proxied(tmp_path_factory: pytest.TempPathFactory, toxiproxy: Toxiproxy) -> AsyncIterator[Proxied]:
    """Run the services with two workers; every test removes its faults and uses its own date."""
    async with ChaosUpstream(cities=CITIES, dates=list(DATES), seed=11) as upstream:
        settings = load_settings(
            {
                "TRIPFOLD_S3_ENDPOINT_URL": os.environ[PROXIED_S3_VARIABLE],
                "TRIPFOLD_S3_BUCKET": BUCKET_OF_TESTS,
                "TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": os.environ[PROXIED_KAFKA_VARIABLE],
                "TRIPFOLD_KAFKA_PARTITIONS": "3",
                "TRIPFOLD_TOPIC_PREFIX": PREFIX_OF_TOPICS,
                "TRIPFOLD_KAFKA_GROUP_INSTANCE_ID": "network",
                "TRIPFOLD_KAFKA_SESSION_TIMEOUT_S": "10",
                "TRIPFOLD_RETRY_WAIT_MAX_S": "2",
                "TRIPFOLD_STALLED_REQUEST_AFTER_S": "20",
                "TRIPFOLD_PROGRESS_INTERVAL_S": "0.1",
                "TRIPFOLD_UPSTREAM_URL": upstream.url,
                "TRIPFOLD_UPSTREAM_REQUESTS_PER_S": "200",
            }
        )
        logs = tmp_path_factory.mktemp("network")
        with ToxiproxyLog(os.environ[TOXIPROXY_CONTAINER_VARIABLE]) as log:
            async with running(settings, logs, workers=2) as services:
                yield Proxied(running=services, upstream=upstream, toxiproxy=toxiproxy, log=log, dates=list(DATES))


def oracle_arguments(proxied: Proxied, date: str) -> list[str]:
    """Return the arguments of the oracle, which bypasses the proxy."""
    return [
        *("--s3", os.environ[S3_VARIABLE], "--bucket", BUCKET_OF_TESTS),
        *("--api", str(proxied.running.client.base_url).rstrip("/"), "--upstream", proxied.upstream.url),
        *("--kafka", os.environ[KAFKA_VARIABLE], "--prefix", PREFIX_OF_TOPICS),
        *("--truth", "--dates", date),
    ]
