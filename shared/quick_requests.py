"""Many small objects: GET, LIST and a conditional PUT without most of what botocore does around a request.

A range of the statistics can take tens of thousands of reads, and a rebuild as many writes; botocore takes some 2 ms of
CPU for each: it resolves an endpoint for every key, and parses a listing element by element by its model. Here a
request is signed by botocore's signer, sent by aiohttp, and a listing is taken apart by its few known elements.
Whatever is not the plain answer to a plain question is a `Declined`: the caller asks again through botocore, whose
retries and verdicts count. A write that was declined may have happened: the second one then loses the race to it.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Awaitable, Callable, Mapping
from html import unescape
from http import HTTPStatus
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import yarl
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError
from botocore.utils import get_environ_proxies

from shared.tls import client_context

_CONTENTS = re.compile(r"<Contents>(.*?)</Contents>", re.DOTALL)
_ELEMENT = re.compile(r"<(Key|LastModified|ETag|Size)>([^<]*)</\1>")
_COUNT = re.compile(r"<KeyCount>(\d+)</KeyCount>")
_TRUNCATED = re.compile(r"<IsTruncated>(true|false)</IsTruncated>")
_TOKEN = re.compile(r"<NextContinuationToken>([^<]+)</NextContinuationToken>")
_URL_ENCODED = "<EncodingType>url</EncodingType>"


class Declined(Exception):
    """The answer is not the plain one: it is botocore's to find out what it means."""


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
        credentials: Callable[[], Awaitable[Any]],
        pool_size: int,
        ca_file: str = "",
    ) -> None:
        self._bucket_url = bucket_url
        self._region = region
        self._credentials = credentials
        self._pool_size = pool_size
        self._ca_file = ca_file
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        context = client_context(self._ca_file) if self._ca_file else True
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._pool_size, ssl=context),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=30),
            auto_decompress=False,
            # Told once: aiohttp would look for it, and for a password in .netrc, in two threads for each request.
            proxy=proxy_of(self._bucket_url() or ""),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, key: str, *, first_bytes: int | None) -> tuple[bytes, str] | None:
        """Return an object's bytes, or its first ones, and its ETag; None if there is none. Raises Declined."""
        headers = {} if first_bytes is None else {"Range": f"bytes=0-{first_bytes - 1}"}
        status, etag, body = await self._answer("GET", self._url_of(key), headers)
        if status == HTTPStatus.NOT_FOUND and b"<Code>NoSuchKey</Code>" in body:
            return None
        if status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT} or not etag:
            raise Declined(f"{status} for {key}")
        return body[:first_bytes], etag

    async def swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        """Write an object only if its ETag is ``etag`` (None: only if there is none); return the new ETag.

        Raises NotMet, Conflict, and Declined, after which it may have been written.
        """
        condition = {"If-None-Match": "*"} if etag is None else {"If-Match": etag}
        headers = {"Content-Type": "application/json", **condition}
        status, new_etag, answer = await self._answer("PUT", self._url_of(key), headers, body)
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

    def _url_of(self, key: str) -> str:
        return f"{self._bucket_url()}/{quote(key, safe='/-_.~')}"

    async def page(self, prefix: str, *, keys_max: int, after: str = "", token: str | None = None) -> Page:
        """Return a page of a listing. Raises Declined."""
        query = {"list-type": "2", "max-keys": str(keys_max), "prefix": prefix}
        if token is not None:
            query["continuation-token"] = token
        elif after:
            query["start-after"] = after
        told = "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))
        status, _, body = await self._answer("GET", f"{self._bucket_url()}?{told}", {})
        if status != HTTPStatus.OK:
            raise Declined(f"{status} for the listing of {prefix}")
        return parse_page(body)

    async def _answer(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> tuple[int, str, bytes]:
        request = AWSRequest(method=method, url=url, headers=dict(headers), data=body)
        assert self._session is not None
        try:
            S3SigV4Auth(await self._credentials(), "s3", self._region).add_auth(request)
            async with self._session.request(
                method,
                yarl.URL(url, encoded=True),
                headers=dict(request.headers.items()),
                data=body,
                allow_redirects=False,
            ) as answer:
                return answer.status, answer.headers.get("ETag", ""), await answer.read()
        except (aiohttp.ClientError, BotoCoreError, TimeoutError, OSError) as error:
            raise Declined(str(error)) from error


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
