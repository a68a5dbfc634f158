"""Chooses free ports on loopback."""

from __future__ import annotations

import itertools
import os
import socket

from shared.domain.errors import OperatorError

PORT_MIN = 11_000
# SeaweedFS opens a gRPC port 10,000 above each of its ports. Both stay below 32,768, where Linux begins to give ports
# to outgoing connections: such a connection could take the port before the server binds it.
PORT_MAX = 20_999

# A process returns each port once, and processes begin at different ports. So two test processes rarely choose the same
# port in the moment before a child binds it.
_numbers = itertools.count(os.getpid() * 331)


def free_port(what: str, *, fixed: int | None = None, preferred: int | None = None) -> int:
    """Return a free port of 127.0.0.1: ``fixed``, or ``preferred`` if it is free, or another one.

    Raises OperatorError, which names ``what``, if ``fixed`` cannot be bound.
    """
    if fixed is not None:
        if error := _bind_error(fixed):
            raise OperatorError(
                f"Port {fixed} for {what} cannot be opened: {error.strerror}. Stop the program that uses it, or choose "
                "another port."
            )
        return fixed
    if preferred is not None and not _bind_error(preferred):
        return preferred
    for number in itertools.islice(_numbers, PORT_MAX):
        port = PORT_MIN + number % (PORT_MAX - PORT_MIN)
        if not _bind_error(port):
            return port
    raise OperatorError(f"No port from {PORT_MIN} to {PORT_MAX} is free for {what}.")


def _bind_error(port: int) -> OSError | None:
    for address in ("127.0.0.1", ""):  # SeaweedFS refuses a port that is taken on any address
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # Otherwise connections of a server that has just stopped would block its port for a minute.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                return error
    return None
