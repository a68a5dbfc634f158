"""Chooses loopback ports that can be bound.

A process gives each number once only, and processes begin at different numbers. So two test workers hardly ever choose
the same port in the moment before a child binds it; if they do, the child ends and says so in its log.
"""

from __future__ import annotations

import itertools
import os
import socket

import msgspec

from shared.domain.errors import OperatorError

GRPC_OFFSET = 10_000
PORT_MIN = 11_000
# With its gRPC port, 10,000 above, it stays below 32,768, where Linux begins to hand out ports to outgoing
# connections: one of those could take the port before the server has bound it. Port 0 would choose from there.
PORT_MAX = 32_767 - GRPC_OFFSET
FIXED_PORT_MAX = 65_535 - GRPC_OFFSET

_numbers = itertools.count(os.getpid() * 331)

PURPOSES = {
    "s3": "S3",
    "master": "the S3 server's master",
    "volume": "the S3 server's volumes",
    "filer": "the S3 server's filer",
    "admin": "the S3 server's maintenance",
    "kafka": "Kafka",
    "broker": "the broker behind Kafka's port",
}


class PortTaken(OperatorError):
    """Another program uses the port that was asked for."""

    def __init__(self, port: int, what: str) -> None:
        super().__init__(
            f"Port {port}, wanted for {what}, is used by another program: stop that one or choose another port."
        )
        self.port = port


class PortOutOfRange(OperatorError):
    """The port that was asked for cannot be used at all."""

    def __init__(self, port: int, what: str, port_max: int) -> None:
        super().__init__(f"Port {port}, wanted for {what}, is out of range: choose one from 1 to {port_max}.")


class EmbeddedPorts(msgspec.Struct, frozen=True, kw_only=True):
    """The ports of an embedded stack. Each port of the S3 server has a gRPC port beside it, 10,000 above."""

    s3: int
    master: int
    volume: int
    filer: int
    admin: int
    kafka: int
    broker: int

    def with_grpc(self) -> list[int]:
        """List every port, the gRPC ports included."""
        pairs = [self.s3, self.master, self.volume, self.filer, self.admin]
        return [*pairs, *(port + GRPC_OFFSET for port in pairs), self.kafka, self.broker]


def free_ports(
    *, s3: int | None = None, kafka: int | None = None, preferred: EmbeddedPorts | None = None
) -> EmbeddedPorts:
    """Choose the ports of an embedded stack: ``s3`` and ``kafka`` as given, the ``preferred`` ones if they are free."""
    fixed = {"s3": s3, "kafka": kafka}
    wishes = msgspec.structs.asdict(preferred) if preferred else {}
    chosen = {
        name: free_port(
            what, fixed=fixed.get(name), preferred=wishes.get(name), with_grpc=name not in {"kafka", "broker"}
        )
        for name, what in PURPOSES.items()
    }
    return EmbeddedPorts(**chosen)


def free_port(what: str, *, fixed: int | None = None, preferred: int | None = None, with_grpc: bool = False) -> int:
    """Choose a free loopback port for ``what``; with ``with_grpc`` the port 10,000 above it is free too.

    A ``fixed`` port is taken as given, or PortTaken or PortOutOfRange is raised; a ``preferred`` one if it is free.
    Nothing listens on the port yet.
    """
    offsets = (0, GRPC_OFFSET) if with_grpc else (0,)
    if fixed is not None:
        port_max = FIXED_PORT_MAX if with_grpc else 65_535
        if not 1 <= fixed <= port_max:
            raise PortOutOfRange(fixed, what, port_max)
        for offset in offsets:
            if not _can_be_bound(fixed + offset):
                raise PortTaken(fixed + offset, f"{what} (gRPC, {GRPC_OFFSET} above {fixed})" if offset else what)
        return fixed
    candidates = (PORT_MIN + number % (PORT_MAX - PORT_MIN) for number in itertools.islice(_numbers, PORT_MAX))
    for port in itertools.chain([preferred] if preferred else [], candidates):
        if all(_can_be_bound(port + offset) for offset in offsets):
            return port
    raise OperatorError(f"No port from {PORT_MIN} to {PORT_MAX} is free for {what}: stop programs that use them.")


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
