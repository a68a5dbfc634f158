"""Tripfold's services as processes, against the S3 and Kafka of a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from shared.kafka.admin import apply_topics
from shared.runtime.settings import PREFIX, Settings
from shared.storage.generation_pointer import provision_pointer
from shared.storage.s3 import S3Store
from tests.integration.forking import ForkingSupervisor
from tripfold.local.ports import free_port
from tripfold.local.supervisor import ChildProcess, Probe, Supervisor, http_probe

ROLES = {
    "planner": ("serve", "ingest", "--role", "planner"),
    "worker": ("serve", "ingest", "--role", "worker"),
    "aggregate": ("serve", "aggregate"),
}
DEADLINE_S = 60.0
_Result = TypeVar("_Result")
ENDED = {"completed", "completed with failures", "failed"}


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the variables that make a process use ``settings``."""
    values = settings.model_dump(exclude_none=True)
    values["kafka_password"] = settings.kafka_password.get_secret_value()
    return {**os.environ, **{f"{PREFIX}{name}".upper(): str(value) for name, value in values.items()}}


class Running(msgspec.Struct, frozen=True):
    """The services of a test: a client of their API, their bucket, and their supervisor."""

    client: httpx.AsyncClient
    store: S3Store
    supervisor: Supervisor
    settings: Settings
    logs: Path

    async def request(self, date: str) -> str:
        """Request a date; return where its progress is."""
        answer = await self.client.post("/process-request", params={"date": date})
        assert answer.status_code == 202, answer.text
        return answer.headers["location"]

    async def ended(self, where: str) -> dict[str, Any]:
        """Wait until a request has ended, and return it."""

        async def look() -> dict[str, Any] | None:
            answer = await self.client.get(where)
            assert answer.status_code == 200, answer.text
            request: dict[str, Any] = answer.json()
            return request if request["status"] in ENDED else None

        return await eventually(look, f"{where} to end; logs in {self.logs}")

    async def process(self, date: str) -> dict[str, Any]:
        """Request a date and wait until that has ended."""
        return await self.ended(await self.request(date))

    async def stats(self, first: str, last: str | None = None, **query: str) -> dict[str, Any]:
        """Ask for the statistics of a range, or of one date."""
        answer = await self.client.get("/country-stats", params={"from": first, "to": last or first, **query})
        assert answer.status_code == 200, answer.text
        statistics: dict[str, Any] = answer.json()
        return statistics


async def eventually(
    look: Callable[[], Awaitable[_Result | None]], what: str, *, deadline_s: float = DEADLINE_S
) -> _Result:
    """Call ``look`` until it returns something; fail loudly after ``deadline_s``."""
    ends_at_s = time.monotonic() + deadline_s
    while True:
        result = await look()
        if result is not None:
            return result
        if time.monotonic() > ends_at_s:
            raise AssertionError(f"waited {deadline_s:.0f} s for {what}")
        await asyncio.sleep(0.05)


async def until(probe: Probe, what: str) -> None:
    """Wait until ``probe`` is true."""

    async def look() -> bool | None:
        return await probe() or None

    await eventually(look, what)


@contextlib.asynccontextmanager
async def running(
    settings: Settings, logs: Path, *, workers: int = 1, own: Mapping[str, Mapping[str, str]] | None = None
) -> AsyncIterator[Running]:
    """Provision the topics and the bucket, start the services, and stop them at the end.

    ``own`` holds variables that a service, named as in ROLES or ``api``, is to have of its own.
    """
    api_port = free_port("the API of a test")
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(S3Store(settings))
        await store.create_bucket()
        await provision_pointer(store)
        await apply_topics(settings)
        environment = {
            **environment_of(settings),
            f"{PREFIX}API_PORT": str(api_port),
            f"{PREFIX}API_ACCESS": "open",
            f"{PREFIX}API_SHUTDOWN_DELAY_S": "0",
            f"{PREFIX}LOG_FORMAT": "text",
        }
        children = []
        for name, arguments in ROLES.items():
            for number in range(workers if name == "worker" else 1):
                port = free_port(name)
                extra = {f"{PREFIX}HEALTH_PORT": str(port), **(own or {}).get(name, {})}
                if number:
                    extra[f"{PREFIX}KAFKA_GROUP_INSTANCE_ID"] = f"{settings.kafka_group_instance_id}-{number}"
                url = f"http://127.0.0.1:{port}/health/ready"
                children.append(_child(f"{name}{number or ''}", arguments, environment | extra, logs, url))
        api_url = f"http://127.0.0.1:{api_port}"
        extra = dict((own or {}).get("api", {}))
        children.append(_child("api", ("serve", "api"), environment | extra, logs, f"{api_url}/health/ready"))
        supervisor = await stack.enter_async_context(ForkingSupervisor())
        await supervisor.start(*children)
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=api_url, timeout=30, trust_env=False))
        yield Running(client, store, supervisor, settings, logs)


def _child(name: str, arguments: tuple[str, ...], environment: dict[str, str], logs: Path, url: str) -> ChildProcess:
    return ChildProcess(
        name=name,
        argv=arguments,
        env=environment,
        log_path=logs / f"{name}.log",
        ready=http_probe(url),
    )
