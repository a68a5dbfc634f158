"""An upstream that needs almost no CPU: it sends a block of trips over and over, without reading it.

The file of city 4007 is four blocks, that of city 31000 is 31: the thousands count. The kernel copies the block from
the page cache into the socket (`sendfile`), so what is measured is Tripfold. Each block is the same bytes: nothing in
Tripfold looks further back than the delays it has seen, of which a block has all there are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import socket
import socketserver
from pathlib import Path
from typing import Final

import msgspec

BLOCK_BYTES: Final = 32_000_000
HEAD_BYTES_MAX: Final = 65_536
COUNTRIES: Final = 10
LARGE_BLOCKS: Final = 100
_CITIES: Final = b"GET /cities "
_STATS: Final = re.compile(rb"GET /cities/([0-9]+)/stats\?date=([0-9-]{10}) ")


class Sums(msgspec.Struct, frozen=True):
    """The sums over the trips of a file."""

    trips: int
    passengers: int
    accidents: int
    delay_total_ms: int

    def times(self, number: int) -> Sums:
        """Return the sums of so many files like this one."""
        return Sums(
            self.trips * number, self.passengers * number, self.accidents * number, self.delay_total_ms * number
        )


def write_block(path: Path, *, date: str, size_bytes: int = BLOCK_BYTES, seed: int = 1) -> Sums:
    """Write trips as the reference upstream does, a comma after each; return what they add up to."""
    dice = random.Random(seed)
    written_bytes = trips = passengers_total = accidents = delay_total_s = 0
    with path.open("w") as out:
        while written_bytes < size_bytes:
            passengers, delay_s, accident = dice.randrange(100), dice.randrange(7200), dice.random() < 0.01
            time_of_day = f"{dice.randrange(24):02d}:{dice.randrange(60):02d}:{dice.randrange(60):02d}"
            written_bytes += out.write(
                f'{{"departure-time":"{date}T{time_of_day}","bus-type":"BUS-{dice.randrange(1000)}",'
                f'"passengers":{passengers},"delay":"PT{delay_s}S","accident":{json.dumps(accident)}}},'
            )
            trips += 1
            passengers_total += passengers
            accidents += accident
            delay_total_s += delay_s
    return Sums(trips, passengers_total, accidents, delay_total_s * 1000)


def city_id(*, blocks: int, number: int) -> int:
    """Return the id of one of the thousand cities whose files have so many blocks."""
    return blocks * 1000 + number


class UpstreamServer(socketserver.ThreadingTCPServer):
    """Serves ``/cities``, and ``/cities/{id}/stats`` for any date. A thread for each request."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, block: Path, *, cities: int = 0, large: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.block = block
        self.city_ids = [city_id(blocks=1, number=number) for number in range(cities)]
        self.city_ids += [city_id(blocks=LARGE_BLOCKS, number=number) for number in range(large)]
        self.block_bytes = block.stat().st_size


class _Answer(socketserver.BaseRequestHandler):
    server: UpstreamServer
    request: socket.socket

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES_MAX:
            received = self.request.recv(HEAD_BYTES_MAX)
            if not received:
                return
            head += received
        asked_for = _STATS.match(head)
        if head.startswith(_CITIES):
            self._send_cities()
        elif asked_for is None:
            self.request.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        else:
            with contextlib.suppress(ConnectionError):
                self._send_file(int(asked_for[1]) // 1000)

    def _send_cities(self) -> None:
        cities = [
            {"id": one, "name": f"City {one}", "country": f"Country {one % COUNTRIES}"} for one in self.server.city_ids
        ]
        body = json.dumps(cities).encode()
        self._begin(len(body))
        self.request.sendall(body)

    def _send_file(self, blocks: int) -> None:
        # The last block goes without its last comma, which makes room for one bracket.
        self._begin(blocks * self.server.block_bytes + 1)
        self.request.sendall(b"[")
        with self.server.block.open("rb", buffering=0) as block:
            for number in range(blocks):
                end = self.server.block_bytes - (number == blocks - 1)
                sent = 0
                while sent < end:
                    sent += os.sendfile(self.request.fileno(), block.fileno(), sent, end - sent)
        self.request.sendall(b"]")

    def _begin(self, size_bytes: int) -> None:
        head = (
            f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {size_bytes}\r\n"
            "connection: close\r\n\r\n"
        )
        self.request.sendall(head.encode())


def main() -> None:
    """Serve until the process is ended; the first line printed is where."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--block", type=Path, required=True, help="a file that `write_block` has written")
    parser.add_argument("--cities", type=int, default=0, help="cities in the list; each file is one block")
    parser.add_argument("--large", type=int, default=0, help=f"cities in the list with files of {LARGE_BLOCKS} blocks")
    options = parser.parse_args()
    with UpstreamServer(options.block, cities=options.cities, large=options.large) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
