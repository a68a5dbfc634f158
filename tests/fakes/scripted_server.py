"""An HTTP server that fails as told: it answers each connection with the next of some responses."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence

SILENCE = None
"""Keeps the connection open, and sends nothing."""
HANG_UP = b""
"""Closes the connection without a response."""


def response(status: int, body: object, **headers: str) -> bytes:
    """Return a response with a body as JSON. An underscore in the name of a header is a dash."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(content)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


def event_stream(*states: object, cut: bool = False) -> bytes:
    """Return a stream with an event for each state. A cut one ends in the middle of a chunk."""
    events = "".join(f"event: progress\ndata: {json.dumps(state)}\n\n" for state in states).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n" % (len(events), events) + (b"ff\r\nevent" if cut else b"0\r\n\r\n")


@contextlib.contextmanager
def scripted_server(*responses: bytes | None) -> Iterator[tuple[str, Sequence[str]]]:
    """Serve while the block lasts; yield the address, and the requests so far, each as its head."""
    seen: list[str] = []
    silent: list[socket.socket] = []
    left = iter(responses)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # the block has ended
                    return
                connection.settimeout(10)
                head = b""
                while b"\r\n\r\n" not in head and (received := connection.recv(65536)):
                    head += received
                if not head:
                    connection.close()  # it was the end of the block that connected
                    return
                seen.append(head.decode())
                answer = next(left)
                if answer is SILENCE:
                    silent.append(connection)
                    continue
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        finally:
            with socket.create_connection(listener.getsockname()):
                pass
            thread.join(10)
            for connection in silent:
                connection.close()
