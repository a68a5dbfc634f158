"""Chooses free loopback ports, and keeps two programs of Tripfold from choosing the same one.

A port is free if it can be bound. Between that test and the moment a child binds the port, nothing would keep a
second test worker from the same choice, so each port is also claimed: one byte of one file is locked, the port's
number being the byte's place. The kernel gives the lock back when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

import msgspec

from shared.errors import OperatorError

GRPC_OFFSET = 10_000
PORT_MIN = 11_000
# With its gRPC port, 10,000 above, it stays below 32,768, where Linux begins to hand out ports to outgoing
# connections: one of those could take the port before the server has bound it.
PORT_MAX = 32_767 - GRPC_OFFSET
FIXED_PORT_MAX = 65_535 - GRPC_OFFSET
ATTEMPTS_MAX = 200


class PortTaken(OperatorError):
    """Another program uses the port that was asked for."""

    def __init__(self, port: int, what: str) -> None:
        super().__init__(
            f"Port {port}, wanted for {what}, is used by another program: stop that one or choose another port."
        )
        self.port = port
        self.what = what


class PortOutOfRange(OperatorError):
    """The port that was asked for cannot be used at all."""

    def __init__(self, port: int, what: str, port_max: int) -> None:
        super().__init__(f"Port {port}, wanted for {what}, is out of range: choose one from 1 to {port_max}.")
        self.port = port
        self.what = what


class EmbeddedPorts(msgspec.Struct, frozen=True, kw_only=True):
    """The ports of an embedded stack. Each port of the S3 server has a gRPC port beside it, 10,000 above."""

    s3: int
    master: int
    volume: int
    filer: int
    admin: int
    kafka: int
    broker: int


def free_ports(
    *, s3: int | None = None, kafka: int | None = None, preferred: EmbeddedPorts | None = None
) -> EmbeddedPorts:
    """Choose and claim the ports of an embedded stack.

    ``s3`` and ``kafka`` are taken as given: PortTaken or PortOutOfRange if that cannot be. The ``preferred`` ones
    are taken if they are free. Give all back with ``release_ports``.
    """
    claimed: list[int] = []
    wishes: dict[str, int] = {} if preferred is None else msgspec.structs.asdict(preferred)

    def choose(what: str, name: str, *, fixed: int | None = None, with_grpc: bool = True) -> int:
        port = free_port(what, fixed=fixed, preferred=wishes.get(name), with_grpc=with_grpc)
        claimed.extend([port, port + GRPC_OFFSET] if with_grpc else [port])
        return port

    try:
        # The fixed ones first, so that no port chosen here can be in their way.
        s3_port = choose("S3", "s3", fixed=s3)
        kafka_port = choose("Kafka", "kafka", fixed=kafka, with_grpc=False)
        return EmbeddedPorts(
            s3=s3_port,
            master=choose("the S3 server's master", "master"),
            volume=choose("the S3 server's volumes", "volume"),
            filer=choose("the S3 server's filer", "filer"),
            admin=choose("the S3 server's maintenance", "admin"),
            kafka=kafka_port,
            broker=choose("the broker behind Kafka's port", "broker", with_grpc=False),
        )
    except Exception:
        release_ports(*claimed)
        raise


def free_port(what: str, *, fixed: int | None = None, preferred: int | None = None, with_grpc: bool = False) -> int:
    """Choose and claim a free loopback port for ``what``, with ``with_grpc`` also the port 10,000 above it.

    A ``fixed`` port is taken as given, or PortTaken or PortOutOfRange is raised; a ``preferred`` one if it is free.
    Nothing listens on the port yet. It stays claimed until ``release_ports`` or the end of the process.
    """
    offsets = (0, GRPC_OFFSET) if with_grpc else (0,)
    if fixed is not None:
        port_max = FIXED_PORT_MAX if with_grpc else 65_535
        if not 1 <= fixed <= port_max:
            raise PortOutOfRange(fixed, what, port_max)
        taken = _claim(fixed, offsets)
        if taken is not None:
            raise PortTaken(taken, what if taken == fixed else f"{what} (gRPC, {GRPC_OFFSET} above {fixed})")
        return fixed
    if preferred is not None and _claim(preferred, offsets) is None:
        return preferred
    for _ in range(ATTEMPTS_MAX):
        port = random.SystemRandom().randint(PORT_MIN, PORT_MAX)
        if _claim(port, offsets) is None:
            return port
    raise RuntimeError(f"No free port for {what} from {PORT_MIN} to {PORT_MAX} in {ATTEMPTS_MAX} attempts.")


def release_ports(*ports: int) -> None:
    """Let the ports be chosen again, by this process or another."""
    for port in ports:
        if port in _claimed:
            _claimed.remove(port)
            fcntl.lockf(_claims_fd(), fcntl.LOCK_UN, 1, port)


def ports_with_grpc(ports: EmbeddedPorts) -> list[int]:
    """List every port of a stack, the gRPC ports included."""
    pairs = [ports.s3, ports.master, ports.volume, ports.filer, ports.admin]
    return [*pairs, *(port + GRPC_OFFSET for port in pairs), ports.kafka, ports.broker]


_claimed: set[int] = set()
_fd: int | None = None


def _claims_fd() -> int:
    # Opened once and never closed: closing any descriptor of the file would give all the process's locks back.
    global _fd  # noqa: PLW0603  # the locks belong to the process, and so does the descriptor
    if _fd is None:
        path = Path(tempfile.gettempdir()) / f"tripfold-ports-{os.getuid()}.lock"
        _fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return _fd


def _claim(port: int, offsets: tuple[int, ...]) -> int | None:
    """Claim the port and those at its offsets, all or none, and return the one that is taken, if one is."""
    claimed: list[int] = []
    for candidate in (port + offset for offset in offsets):
        if not _claim_one(candidate):
            release_ports(*claimed)
            return candidate
        claimed.append(candidate)
    return None


def _claim_one(port: int) -> bool:
    if port in _claimed:
        return False
    try:
        fcntl.lockf(_claims_fd(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    _claimed.add(port)
    if not _can_be_bound(port):
        release_ports(port)
        return False
    return True


def _can_be_bound(port: int) -> bool:
    # The S3 server tries its ports on all addresses too, and refuses one that is taken on any.
    for address in ("127.0.0.1", ""):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # Else connections of a server that has just stopped would make its port look taken for a minute.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True
