"""Many small objects: GET, LIST and a conditional PUT without most of what botocore does around a request.

A range of the statistics can take tens of thousands of reads, and a rebuild as many writes; botocore takes some 2 ms of
CPU for each: it resolves an endpoint for every key, and parses a listing element by element by its model. Here a
request is signed with a key of the day (`shared.signature`), sent over a connection that is kept
(`shared.kept_connections`), and a listing is taken apart by its few known elements, for a twentieth of that. Whatever
is not the plain answer to a plain question is a `Declined`: the caller asks again through botocore, whose retries and
verdicts count. A write that was declined may have happened: the second one then loses the race to it.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Awaitable, Callable, Mapping
from html import unescape
from http import HTTPStatus
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import quote, unquote, urlsplit

from botocore.exceptions import BotoCoreError
from botocore.utils import get_environ_proxies

from shared.kept_connections import Answer, Declined, KeptConnections, Origin
from shared.signature import Credentials, Signer
from shared.tls import client_context

_CONTENTS = re.compile(r"<Contents>(.*?)</Contents>", re.DOTALL)
_ELEMENT = re.compile(r"<(Key|LastModified|ETag|Size)>([^<]*)</\1>")
_COUNT = re.compile(r"<KeyCount>(\d+)</KeyCount>")
_TRUNCATED = re.compile(r"<IsTruncated>(true|false)</IsTruncated>")
_TOKEN = re.compile(r"<NextContinuationToken>([^<]+)</NextContinuationToken>")
_PLAIN_IN_URLS = re.compile(r"[A-Za-z0-9/._~%-]*")
_URL_ENCODED = "<EncodingType>url</EncodingType>"


class Conflict(Exception):
    """Another write of the object is under way: it is not decided yet whether the condition holds."""


class NotMet(Exception):
    """The condition of a write does not hold."""


class Entry(NamedTuple):
    """An object of a listing."""

    key: str
    etag: str
    size_bytes: int
    last_modified: dt.datetime


class Page(NamedTuple):
    """A page of a listing, and the token of the next one."""

    entries: list[Entry]
    next_token: str | None


class QuickRequests:
    """Requests to one bucket; an async context manager. ``bucket_url`` and ``credentials`` tell those of the moment."""

    def __init__(
        self,
        *,
        bucket_url: Callable[[], str | None],
        region: str,
        credentials: Callable[[], Awaitable[Credentials]],
        pool_size: int,
        ca_file: str = "",
    ) -> None:
        self._bucket_url = bucket_url
        self._credentials = credentials
        self._signer = Signer(region)
        encrypted = (bucket_url() or "").startswith("https:")
        self._connections = KeptConnections(
            connections_max=pool_size, tls=client_context(ca_file) if encrypted else None
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connections.close()

    async def get(self, key: str, *, first_bytes: int | None) -> tuple[bytes, str] | None:
        """Return an object's bytes, or its first ones, and its ETag; None if there is none. Raises Declined."""
        headers = {} if first_bytes is None else {"range": f"bytes=0-{first_bytes - 1}"}
        status, fields, body = await self._answer("GET", _encoded(key), "", headers)
        etag = fields.get("etag")
        if status == HTTPStatus.NOT_FOUND and b"<Code>NoSuchKey</Code>" in body:
            return None
        if status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT} or not etag:
            raise Declined(f"{status} for {key}")
        return body[:first_bytes], etag

    async def swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        """Write an object only if its ETag is ``etag`` (None: only if there is none); return the new ETag.

        Raises NotMet, Conflict, and Declined, after which it may have been written.
        """
        condition = {"if-none-match": "*"} if etag is None else {"if-match": etag}
        headers = {"content-type": "application/json", **condition}
        status, fields, answer = await self._answer("PUT", _encoded(key), "", headers, body)
        new_etag = fields.get("etag")
        if status == HTTPStatus.OK and new_etag:
            return new_etag
        if status == HTTPStatus.CONFLICT:
            raise Conflict(key)
        # Stores differ on If-Match for a missing key: 404 here, 412 there.
        if status == HTTPStatus.PRECONDITION_FAILED or (
            status == HTTPStatus.NOT_FOUND and b"<Code>NoSuchKey</Code>" in answer
        ):
            raise NotMet(key)
        raise Declined(f"{status} for {key}")

    async def page(self, prefix: str, *, keys_max: int, after: str = "", token: str | None = None) -> Page:
        """Return a page of a listing. Raises Declined."""
        query = {"list-type": "2", "max-keys": str(keys_max), "prefix": prefix}
        if token is not None:
            query["continuation-token"] = token
        elif after:
            query["start-after"] = after
        told = "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))
        status, _, body = await self._answer("GET", "", told, {})
        if status != HTTPStatus.OK:
            raise Declined(f"{status} for the listing of {prefix}")
        return parse_page(body)

    async def _answer(
        self, method: str, key: str, query: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Answer:
        url = self._bucket_url()
        assert url is not None
        bucket = _parts_of(url)
        path = f"{bucket.path}/{key}" if key else bucket.path or "/"
        try:
            credentials = await self._credentials()
        except (BotoCoreError, OSError) as error:
            raise Declined(str(error)) from error
        fields = {"host": bucket.host_field, **headers}
        signed = self._signer.signed(
            credentials, dt.datetime.now(dt.UTC), method, path, query=query, headers=fields, body=body or b""
        )
        if body is not None:
            signed["content-length"] = str(len(body))
        lines = "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        target = f"{path}?{query}" if query else path
        head = f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")
        return await self._connections.ask(bucket.origin, head, body or b"")


class _Bucket(NamedTuple):
    origin: Origin
    host_field: str
    path: str


@functools.lru_cache(maxsize=8)
def _parts_of(url: str) -> _Bucket:
    parts = urlsplit(url)
    origin = Origin(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    return _Bucket(origin, parts.netloc, parts.path)


def _encoded(key: str) -> str:
    encoded = key.replace("=", "%3D")  # nearly always all there is to do, and quote takes 15 µs
    return encoded if _PLAIN_IN_URLS.fullmatch(encoded) and "%" not in key else quote(key, safe="/-_.~")


def proxy_of(url: str) -> str | None:
    """Return the proxy that the environment tells for a URL, as botocore finds it."""
    proxy: str | None = get_environ_proxies(url).get(urlsplit(url).scheme)
    return proxy


def bucket_url_of(endpoint_url: str, bucket: str, addressing_style: str) -> str | None:
    """Return the URL of a bucket's objects, or None where only botocore knows it."""
    parts = urlsplit(endpoint_url)
    if addressing_style == "path":
        return f"{endpoint_url.rstrip('/')}/{bucket}"
    if addressing_style == "virtual" and not parts.path.strip("/"):
        return f"{parts.scheme}://{bucket}.{parts.netloc}"
    return None


def parse_page(body: bytes) -> Page:
    """Take a page of a listing apart. Raises Declined if it is not what every store writes."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Declined(f"a listing that is no UTF-8: {error.reason}") from error
    count, truncated, token = _COUNT.search(text), _TRUNCATED.search(text), _TOKEN.search(text)
    encoded = _URL_ENCODED in text
    entries = []
    for contents in _CONTENTS.finditer(text):
        found = dict(_ELEMENT.findall(contents[1]))
        try:
            key = unescape(found["Key"])
            entries.append(
                Entry(
                    key=unquote(key) if encoded else key,
                    etag=unescape(found["ETag"]),
                    size_bytes=int(found["Size"]),
                    last_modified=dt.datetime.fromisoformat(found["LastModified"]),
                )
            )
        except (KeyError, ValueError) as error:
            raise Declined(f"an entry of a listing without {error}") from error
    if count is None or truncated is None or int(count[1]) != len(entries):
        raise Declined("a listing that does not say how many entries it has, or has another number")
    more = truncated[1] == "true"
    if more and token is None:
        raise Declined("a listing that is not at its end, and has no token")
    return Page(entries, unescape(token[1]) if more and token else None)
