"""Liveness and readiness of the API."""

from __future__ import annotations

import asyncio

import pytest

from services.api import health
from services.api.health import Check, Readiness
from shared.kafka.producer import KafkaPublisher, KafkaUnavailable
from shared.runtime.health import Health
from shared.runtime.metrics import Concern
from shared.runtime.settings import Settings
from shared.storage.object_store import StoreUnavailable
from tests.fakes.api import Client, World, metric, stats

UNUSED_PORT = 1  # nobody listens there


def test_liveness_does_not_depend_on_s3_and_kafka(client: Client) -> None:
    """The liveness check does not depend on S3 and Kafka."""
    assert client.get("/health/live").json() == {"live": True}


async def _reachable() -> None:
    return


async def _unreachable() -> None:
    raise KafkaUnavailable("no broker answers")


def test_api_is_ready_when_it_reaches_its_dependencies() -> None:
    """An API that can reach everything is ready."""
    with World().client(checks={"s3": _reachable, "kafka": _reachable}) as client:
        response = client.get("/health/ready")
    assert (response.status_code, response.json()) == (200, {"ready": True, "faults": {}})


def test_api_without_kafka_is_not_ready_and_still_serves_reads() -> None:
    """An API that cannot reach Kafka is not ready, says why, and still serves what can be read."""
    world = World()
    world.fold_in(stats("armenia"))
    with world.client(checks={"s3": _reachable, "kafka": _unreachable}) as client:
        response = client.get("/health/ready")
        assert (response.status_code, response.json()) == (
            503,
            {"ready": False, "faults": {"kafka": "no broker answers"}},
        )
        assert client.get("/country-stats?from=2024-05-01&to=2024-05-01").status_code == 200
        assert metric(client, "tripfold_ready") == 0.0


async def test_concurrent_readiness_checks_share_one_probe() -> None:
    """Concurrent readiness checks share one probe. That of Kafka is valid for a second, that of S3 for ten."""
    probed: list[str] = []
    now_s = 100.0

    async def count(name: str) -> None:
        probed.append(name)
        await asyncio.sleep(0)

    checks: dict[Concern, Check] = {"s3": lambda: count("s3"), "kafka": lambda: count("kafka")}
    readiness = Readiness(Health(), checks, clock=lambda: now_s)
    await asyncio.gather(*(readiness.report() for _ in range(10)))
    assert probed == ["s3", "kafka"]
    now_s += health.PROBE_AGE_MAX_S
    await readiness.report()
    assert probed == ["s3", "kafka", "kafka"]
    now_s += health.BUCKET_AGE_MAX_S
    await readiness.report()
    assert probed == ["s3", "kafka", "kafka", "s3", "kafka"]


async def test_s3_is_probed_without_being_asked() -> None:
    """An API that nobody asks for its readiness follows the bucket, and leaves Kafka alone."""
    probed = asyncio.Event()

    async def probe() -> None:
        probed.set()

    watching = asyncio.create_task(Readiness(Health(), {"s3": probe, "kafka": _unreachable}).watch())
    await asyncio.wait_for(probed.wait(), 10)
    watching.cancel()


async def test_readiness_recovers_when_the_fault_ends() -> None:
    """A fault is reported only while it lasts."""
    now_s = 100.0
    faults = [StoreUnavailable("S3 is down"), ValueError("odd"), None]
    state = Health()
    state.started = True

    async def check() -> None:
        fault = faults.pop(0)
        if fault is not None:
            raise fault

    readiness = Readiness(state, {"s3": check}, clock=lambda: now_s)
    reports = []
    for _ in range(3):
        reports.append(await readiness.report())
        now_s += health.BUCKET_AGE_MAX_S
    assert [report.faults for report in reports] == [{"s3": "S3 is down"}, {"s3": "odd"}, {}]
    assert [report.ready for report in reports] == [False, False, True]


async def test_dependency_that_does_not_respond_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dependency that does not respond in time is reported as unavailable."""
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.01)

    async def silent() -> None:
        await asyncio.Event().wait()

    report = await Readiness(Health(), {"s3": _reachable, "kafka": silent}).report()
    assert list(report.faults) == ["kafka"]


def test_api_serves_from_the_first_response_of_s3_until_it_stops() -> None:
    """A load balancer sends requests once S3 was reached, also in outages of Kafka and S3, until the process stops."""
    down: list[Exception] = [StoreUnavailable("S3 is down")]

    async def s3() -> None:
        if down:
            raise down[0]

    with World().client(checks={"s3": s3, "kafka": _unreachable}) as client:

        def serving() -> tuple[int, dict[str, object]]:
            response = client.get("/health/serving")
            return response.status_code, response.json()

        context = client.app.state.context
        assert serving() == (503, {"ready": False, "faults": {"s3": "S3 is down"}})
        fault = down.pop()
        context.dependencies["readiness"]._probed_at_s.clear()  # ten seconds later
        assert serving() == (200, {"ready": True, "faults": {}})
        down.append(fault)
        context.dependencies["readiness"]._probed_at_s.clear()
        assert client.get("/health/ready").json()["faults"].keys() == {"s3", "kafka"}
        assert serving() == (200, {"ready": True, "faults": {}})
        context.health.stop()
        stops = {"shutdown": "the process was asked to stop"}
        assert serving() == (503, {"ready": False, "faults": stops})
        assert client.get("/health/ready").json()["faults"].keys() == {"s3", "kafka", "shutdown"}


async def test_kafka_check_fails_without_a_broker() -> None:
    """The check of Kafka fails when no broker listens."""
    settings = Settings.model_validate({"kafka_bootstrap_servers": f"127.0.0.1:{UNUSED_PORT}"})
    with pytest.raises(KafkaUnavailable, match=f"127.0.0.1:{UNUSED_PORT}"):
        await KafkaPublisher(settings, source="test").check()
