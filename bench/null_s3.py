"""An S3 that throws the trip files away: what Tripfold can do when the store is not what limits it.

Small objects (manifests, plans, summaries) are kept in memory and listed, with compare-and-swap, so that the services
run against it. Raw objects are received, counted and forgotten; no signature is checked, nothing is written to a disk.
``GET /?calls`` tells how often each operation was called.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import re
import socket
import socketserver
import threading
from collections import Counter
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

HEAD_BYTES_MAX: Final = 65_536
RECEIVE_BYTES: Final = 1024 * 1024
KEPT_BYTES_MAX: Final = 16 * 1024 * 1024
_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+)")
_IF_MATCH: Final = re.compile(rb"(?i)\r\nif-match: *([^\r]*)")
_IF_NONE_MATCH: Final = re.compile(rb"(?i)\r\nif-none-match: *\*")
_CHUNKED: Final = re.compile(rb"(?i)\r\n(content-encoding: *aws-chunked|transfer-encoding: *chunked)")
_RANGE: Final = re.compile(rb"(?i)\r\nrange: *bytes=0-([0-9]+)")
_EXPECT: Final = re.compile(rb"(?i)\r\nexpect: *100-continue")


class NullS3(socketserver.ThreadingTCPServer):
    """Every bucket there may be; a thread for each connection."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.lock = threading.Lock()
        self.kept: dict[str, tuple[bytes, str]] = {}  # by bucket and key
        self.names: list[str] = []  # those of what is kept, in order
        self.part_sizes_bytes: list[int] = []
        self.etags = (f'"{number:032x}"' for number in itertools.count(1))
        self.calls: Counter[str] = Counter()


class _Connection(socketserver.BaseRequestHandler):
    server: NullS3
    request: socket.socket

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._received = b""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            while self._answer_one():
                pass

    def _answer_one(self) -> bool:
        while b"\r\n\r\n" not in self._received:
            received = self.request.recv(HEAD_BYTES_MAX)
            if not received or len(self._received) > HEAD_BYTES_MAX:
                return False
            self._received += received
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        assert not _CHUNKED.search(head), "set TRIPFOLD_S3_CHECKSUMS=when_required: bodies are taken plain alone"
        if _EXPECT.search(head):
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        url = urlsplit(target)
        path = unquote(url.path).lstrip("/")
        key = path.partition("/")[2]
        query = parse_qs(url.query, keep_blank_values=True)
        length = _LENGTH.search(head)
        body = self._take_body(int(length[1]) if length else 0, keep=not key.startswith("raw/"))
        if "uploadId" in query and method == "PUT":
            self.server.part_sizes_bytes.append(int(length[1]) if length else 0)
        self._reply(method, path, query, head, body)
        return True

    def _take_body(self, size_bytes: int, *, keep: bool) -> bytes:
        assert not keep or size_bytes <= KEPT_BYTES_MAX, "only raw objects may be large"
        kept = [self._received[:size_bytes]]
        missing = size_bytes - len(kept[0])
        self._received = self._received[size_bytes:]
        while missing:
            received = self.request.recv_into(self._buffer, min(missing, RECEIVE_BYTES))
            if not received:
                raise ConnectionError
            missing -= received
            if keep:
                kept.append(bytes(self._buffer[:received]))
        return b"".join(kept)

    def _reply(self, method: str, path: str, query: dict[str, list[str]], head: bytes, body: bytes) -> None:
        bucket, _, key = path.partition("/")
        match method:
            case "PUT" if "uploadId" in query:
                self._send("UploadPart", 200, etag=next(self.server.etags))
            case "PUT" if key:
                self._put(path, head, body)
            case "PUT":
                self._send("CreateBucket", 200)
            case "POST" if "uploads" in query:
                self._send("CreateMultipartUpload", 200, _xml("InitiateMultipartUploadResult", UploadId="1"))
            case "POST":
                self._send("CompleteMultipartUpload", 200, _xml("CompleteMultipartUploadResult", ETag='"1-1"'))
            case "GET" if "calls" in query:
                self._send("calls", 200, json.dumps(self.server.calls).encode())
            case "GET" if key:
                self._get(path, head)
            case "GET":
                self._list(bucket, query)
            case "HEAD":
                self._head(path, is_bucket=not key)
            case _:
                self._delete(path, query)

    def _delete(self, path: str, query: dict[str, list[str]]) -> None:
        if "uploadId" in query:
            self._send("AbortMultipartUpload", 204)
            return
        with self.server.lock:
            if self.server.kept.pop(path, None) is not None:
                del self.server.names[bisect.bisect_left(self.server.names, path)]
        self._send("DeleteObject", 204)

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix = f"{bucket}/{query.get('prefix', [''])[0]}"
        after = query.get("continuation-token") or query.get("start-after") or [""]
        keys_max = int(query.get("max-keys", ["1000"])[0])
        with self.server.lock:
            names = self.server.names
            begin = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, f"{bucket}/{after[0]}"))
            end = bisect.bisect_left(names, f"{prefix}\U0010ffff", begin)
            page = [(name, *self.server.kept[name]) for name in names[begin : min(end, begin + keys_max)]]
        entries = "".join(
            f"<Contents><Key>{escape(name.partition('/')[2])}</Key><LastModified>2024-01-01T00:00:00.000Z"
            f"</LastModified><ETag>{escape(etag)}</ETag><Size>{len(body)}</Size></Contents>"
            for name, body, etag in page
        )
        more = begin + len(page) < end
        token = {"NextContinuationToken": escape(page[-1][0].partition("/")[2])} if more else {}
        listed = _xml("ListBucketResult", KeyCount=str(len(page)), IsTruncated=str(more).lower(), **token)
        self._send(
            "ListObjectsV2", 200, listed.replace(b"</ListBucketResult>", entries.encode() + b"</ListBucketResult>")
        )

    def _put(self, path: str, head: bytes, body: bytes) -> None:
        if_match = _IF_MATCH.search(head)
        with self.server.lock:
            before = self.server.kept.get(path)
            lost = (if_match and (before is None or before[1] != if_match[1].decode())) or (
                _IF_NONE_MATCH.search(head) and before is not None
            )
            etag = next(self.server.etags)
            if not lost and not path.partition("/")[2].startswith("raw/"):
                if before is None:
                    bisect.insort(self.server.names, path)
                self.server.kept[path] = (body, etag)
        if lost:
            self._send("PutObject", 412, _xml("Error", Code="PreconditionFailed"))
        else:
            self._send("PutObject", 200, etag=etag)

    def _get(self, path: str, head: bytes) -> None:
        found = self.server.kept.get(path)
        if found is None:
            self._send("GetObject", 404, _xml("Error", Code="NoSuchKey"))
            return
        body, etag = found
        ranged = _RANGE.search(head)
        if ranged is None:
            self._send("GetObject", 200, body, etag=etag)
            return
        some = body[: int(ranged[1]) + 1]
        deadline = f"content-range: bytes 0-{len(some) - 1}/{len(body)}\r\n"
        self._send("GetObject", 206, some, etag=etag, fields=deadline)

    def _head(self, path: str, *, is_bucket: bool) -> None:
        found = self.server.kept.get(path)
        if is_bucket or found is None:
            self._send("HeadBucket" if is_bucket else "HeadObject", 200 if is_bucket else 404)
        else:
            self._send("HeadObject", 200, found[0], etag=found[1])

    def _send(
        self, operation: str, status: int, body: bytes = b"", *, etag: str | None = None, fields: str = ""
    ) -> None:
        with self.server.lock:
            self.server.calls[operation] += 1
        named = f"etag: {etag}\r\n" if etag else ""
        head = f"HTTP/1.1 {status} OK\r\ncontent-length: {len(body)}\r\n{named}{fields}\r\n"
        self.request.sendall(head.encode() + (b"" if operation.startswith("Head") else body))


def _xml(name: str, **fields: str) -> bytes:
    inner = "".join(f"<{field}>{value}</{field}>" for field, value in fields.items())
    return f'<?xml version="1.0"?><{name}>{inner}</{name}>'.encode()


def main() -> None:
    """Serve until the process is ended; the first line printed is where."""
    with NullS3() as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
