"""How the S3 client finds its credentials and reaches its bucket, as seen by a server that records requests."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
import trustme

from shared.domain import keys
from shared.runtime import tracing
from shared.runtime.settings import Settings, load_settings
from shared.storage import s3
from shared.storage.conditional_writes import NEVER_AN_ETAG, UnsafeStore
from shared.storage.object_store import CasConflict, ObjectInfo, ObjectNotFound, StoredObject, StoreUnavailable
from shared.storage.s3 import S3Store, ca_file_of, endpoint_url_of
from tests.fakes.metrics import REGISTRY
from tests.fakes.traces import traced

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\nETag: "1"\r\nConnection: close\r\n\r\n{}'


class Request(msgspec.Struct):
    """A request as it came: its target, and its headers by lower-case name."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def access_key(self) -> str:
        """Return the access key that the request is signed with."""
        return self.headers["authorization"].partition("Credential=")[2].partition("/")[0]


class Recorder:
    """A server that keeps the requests it gets. ``respond`` may return a response other than success.

    With ``refuses`` it refuses the writes that a store must refuse, and does not keep these requests.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.refuses = True
        self.respond: Callable[[Request], bytes | None] = lambda _: None
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one request of a connection, and respond to it."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            method, target, _ = first.split(" ")
            if self.refuses and target.endswith(keys.WRITE_CHECK):
                writer.write(failing(412))
            else:
                self.requests.append(Request(method, target, headers, body))
                writer.write(self.respond(self.requests[-1]) or ANSWER)
            await writer.drain()
        writer.close()

    def settings(self, **changes: str) -> Settings:
        """Return settings for a bucket of this server."""
        given = {"s3_endpoint_url": self.url, "s3_bucket": "bucket", **changes}
        return load_settings({f"TRIPFOLD_{name}".upper(): value for name, value in given.items()})


@pytest.fixture
async def server() -> AsyncIterator[Recorder]:
    """Run the recording server."""
    recorder = Recorder()
    async with await asyncio.start_server(recorder.serve, "127.0.0.1", 0) as running:
        recorder.url = f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
        yield recorder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Start with static keys in the environment, and an empty home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "environment-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return monkeypatch


@pytest.fixture
def no_keys(environment: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take the static keys away."""
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    return environment


def in_hours(hours: int) -> str:
    """Return a time as AWS writes it."""
    return (dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


def responding(body: str) -> bytes:
    """Return a successful response."""
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def failing(status: int, code: str = "") -> bytes:
    """Return an error response."""
    body = f"<Error><Code>{code}</Code></Error>"
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def observed() -> dict[tuple[str, str], float]:
    """Return how many requests were observed, by operation and result."""
    return {
        (sample.labels["operation"], sample.labels["result"]): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "tripfold_s3_request_seconds_count"
    }


async def list_all(store: S3Store) -> None:
    """List objects."""
    async for _ in store.list("raw/"):
        pass


async def read_whole(store: S3Store) -> None:
    """Read an object chunk by chunk."""
    async for _ in store.stream("a.json"):
        pass


async def upload(store: S3Store) -> None:
    """Upload a small object."""
    writer = store.upload("a.json")
    await writer.write(b"1")
    await writer.complete()


EMPTY_LIST = responding("<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
MISSING = failing(404, "NoSuchKey")
REFUSED = failing(403)
REQUESTS: list[tuple[Callable[[S3Store], Awaitable[object]], bytes, dict[tuple[str, str], int]]] = [
    (lambda store: store.get("a.json"), ANSWER, {("GetObject", "ok"): 1}),
    (lambda store: store.get("a.json"), MISSING, {("GetObject", "not_found"): 1}),
    (lambda store: store.get("a.json"), failing(404, "NoSuchBucket"), {("GetObject", "error"): 1}),
    (lambda store: store.get("a.json", first_bytes=0), ANSWER, {("HeadObject", "ok"): 1}),
    (lambda store: store.get("a.json", first_bytes=0), failing(503), {("HeadObject", "error"): 1}),
    (
        lambda store: store.get("a.json", first_bytes=0),
        MISSING,
        {("HeadObject", "ok"): 1, ("GetObject", "not_found"): 1},
    ),
    (read_whole, ANSWER, {("GetObject", "ok"): 1}),
    (read_whole, MISSING, {("GetObject", "not_found"): 1}),
    (lambda store: store.put("a.json", b"1"), ANSWER, {("PutObject", "ok"): 1}),
    (lambda store: store.put("a.json", b"1"), REFUSED, {("PutObject", "error"): 1}),
    (lambda store: store.compare_and_swap("a", b"1", etag="1"), ANSWER, {("PutObject", "ok"): 1}),
    (lambda store: store.compare_and_swap("a", b"1", etag="1"), failing(412), {("PutObject", "conflict"): 1}),
    (lambda store: store.compare_and_swap("a", b"1", etag="1"), failing(503), {("PutObject", "error"): 1}),
    (lambda store: store.delete("a.json"), ANSWER, {("DeleteObject", "ok"): 1}),
    (lambda store: store.delete("a.json"), REFUSED, {("DeleteObject", "error"): 1}),
    (list_all, EMPTY_LIST, {("ListObjectsV2", "ok"): 1}),
    (list_all, REFUSED, {("ListObjectsV2", "error"): 1}),
    (upload, ANSWER, {("UploadPart", "ok"): 1, ("CompleteMultipartUpload", "ok"): 1}),
    (upload, REFUSED, {("UploadPart", "ok"): 1, ("CompleteMultipartUpload", "error"): 1}),
]


@pytest.mark.parametrize(("call", "response", "expected"), REQUESTS)
async def test_each_request_is_observed_by_operation_and_result(
    server: Recorder,
    call: Callable[[S3Store], Awaitable[object]],
    response: bytes,
    expected: dict[tuple[str, str], int],
) -> None:
    """The histogram of requests to S3 has each request once, and an error names its operation and its object."""
    server.respond = lambda _: response
    operation, result = [*expected][-1]
    async with S3Store(server.settings()) as store:
        await store.check()
        before = observed()
        try:
            with traced() as traces, tracing.server_span("GET", None, {}):
                await call(store)
        except (CasConflict, ObjectNotFound) as error:
            assert str(error) in {"a", "a.json"}  # noqa: PT017  # most calls raise nothing
            assert result in {"conflict", "not_found"}  # as above
        except StoreUnavailable as error:
            assert re.match(f"S3 {operation} of (a|a.json|raw/): ", str(error))  # noqa: PT017  # as above
            assert result == "error"  # as above
    spans = [(one.name, one.attributes or {}) for one in traces.get_finished_spans() if one.name != "GET"]
    assert [(name, found["rpc.method"], found["tripfold.s3.result"]) for name, found in spans] == [
        (f"S3 {operation}", operation, result) for operation, result in expected if operation != "UploadPart"
    ]
    assert all(found["aws.s3.key"] in {"a", "a.json", "raw/"} for _, found in spans)
    assert {key: count - before.get(key, 0) for key, count in observed().items() if count != before.get(key, 0)} == (
        expected
    )


async def test_a_cancelled_request_is_observed(server: Recorder) -> None:
    """A request that is cancelled before its response counts too, with a result of its own."""
    before = observed().get(("GetObject", "cancelled"), 0)
    async with S3Store(server.settings()) as store:
        reading = asyncio.create_task(store.get("a.json"))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert observed()["GetObject", "cancelled"] == before + 1


async def test_keys_of_the_environment_sign_requests(server: Recorder, environment: pytest.MonkeyPatch) -> None:
    """Static keys, and the token that belongs to them, come from the usual variables."""
    environment.setenv("AWS_SESSION_TOKEN", "token")
    async with S3Store(server.settings()) as store:
        await store.get("a.json")
    (request,) = server.requests
    assert (request.access_key, request.headers["x-amz-security-token"]) == ("environment-key", "token")


@pytest.mark.parametrize("profile", ["default", "other"])
async def test_keys_of_a_shared_file_sign_requests(
    server: Recorder, no_keys: pytest.MonkeyPatch, tmp_path: Path, profile: str
) -> None:
    """A shared credentials file is read, and a profile selects in it; renewed credentials are looked up on refusal."""
    file = tmp_path / ".aws" / "credentials"
    file.parent.mkdir()
    text = "[default]\naws_access_key_id = default-key\naws_secret_access_key = s\n"
    file.write_text(text + text.replace("default", "other"))
    if profile != "default":
        no_keys.setenv("AWS_PROFILE", profile)
    async with S3Store(server.settings()) as store:
        await store.get("a.json")
    assert server.requests[0].access_key == f"{profile}-key"


@pytest.mark.parametrize(
    ("status", "interval_s", "used"),
    [
        (403, 0.0, ["old", "new", "newer"]),
        (401, 0.0, ["old", "new", "newer"]),
        (400, 0.0, ["old", "new", "newer"]),
        (404, 0.0, ["old"] * 3),
        (403, 60.0, ["old"] * 3),
    ],
)
async def test_renewed_keys_are_found_after_a_refusal(
    server: Recorder, no_keys: pytest.MonkeyPatch, tmp_path: Path, status: int, interval_s: float, used: list[str]
) -> None:
    """A check that is refused reads the shared file again, at most every few seconds. Other errors are no refusal."""
    no_keys.setattr("shared.storage.s3.CREDENTIALS_INTERVAL_S", interval_s)
    file = tmp_path / "credentials"
    no_keys.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    server.refuses = False
    server.respond = lambda _: failing(status)
    file.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = s\n")
    async with S3Store(server.settings()) as store:
        for key in ("new", "newer"):
            with pytest.raises(StoreUnavailable, match=f"^S3 PutObject of {keys.WRITE_CHECK}: .*{status}"):
                await store.check()
            file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")
        with pytest.raises(StoreUnavailable):
            await store.check()
    assert [request.access_key for request in server.requests] == used


async def test_a_web_identity_is_exchanged_for_keys(
    server: Recorder, no_keys: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A token file and a role (as in Kubernetes) give temporary keys, which the client renews before they expire."""
    token_file = tmp_path / "token"
    token_file.write_text("token-1")
    no_keys.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token_file))
    no_keys.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/tripfold")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    lifetime_h = [0]

    def respond(request: Request) -> bytes | None:
        if "AssumeRoleWithWebIdentity" not in request.target:
            return None
        token = request.target.partition("WebIdentityToken=")[2].partition("&")[0]
        return responding(
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>key-of-{token}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
            f"<Expiration>{in_hours(lifetime_h[0])}</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )

    server.respond = respond
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context) as issuer:
        no_keys.setenv("AWS_ENDPOINT_URL_STS", f"https://127.0.0.1:{issuer.sockets[0].getsockname()[1]}")
        store = S3Store(server.settings(s3_ca_file=str(tmp_path / "authority.pem")))
        await store.get("a.json")
        await asyncio.sleep(0.2)  # the client takes what it was just given, however short its life
        token_file.write_text("token-2")
        lifetime_h[0] = 1
        for _ in range(3):
            await store.get("a.json")
    used = [request.access_key for request in server.requests if "authorization" in request.headers]
    assert used == ["key-of-token-1", *["key-of-token-2"] * 3]


async def test_missing_credentials_are_named(server: Recorder, no_keys: pytest.MonkeyPatch) -> None:
    """Without credentials and without an instance role, the error says so before it names the role's address."""
    no_keys.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
    server.refuses = False
    server.respond = lambda _: b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    async with S3Store(server.settings()) as store:
        with pytest.raises(StoreUnavailable, match=r"check.json: no AWS credentials .*, and no instance role \("):
            await store.check()


async def test_an_instance_role_gives_keys(server: Recorder, no_keys: pytest.MonkeyPatch) -> None:
    """Without anything configured, the metadata service of the instance is asked."""
    no_keys.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)

    def respond(request: Request) -> bytes | None:
        if request.target.endswith("/api/token"):
            return responding("token")
        if request.target.endswith("/security-credentials/"):
            return responding("the-role")
        if request.target.endswith("/the-role"):
            given = {"AccessKeyId": "role-key", "SecretAccessKey": "s", "Token": "t", "Expiration": in_hours(6)}
            return responding(json.dumps({"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": in_hours(0), **given}))
        return None

    server.respond = respond
    async with S3Store(server.settings()) as store:
        await store.get("a.json")
        await store.get("a.json")
    used = [request.access_key for request in server.requests if "authorization" in request.headers]
    assert used == ["role-key", "role-key"]


@pytest.mark.parametrize(("style", "in_host"), [("path", False), ("virtual", True), ("auto", False)])
async def test_the_addressing_style_places_the_bucket(
    server: Recorder, environment: pytest.MonkeyPatch, style: str, in_host: bool
) -> None:
    """The bucket is in the path or in the host name; a server of one's own has it in the path by default."""
    environment.setenv("HTTP_PROXY", server.url)  # no name server knows the bucket's host name
    async with S3Store(server.settings(s3_endpoint_url="http://s3.invalid", s3_addressing_style=style)) as store:
        await store.get("a b.json")
    assert server.requests[0].target == (
        "http://bucket.s3.invalid/a%20b.json" if in_host else "http://s3.invalid/bucket/a%20b.json"
    )


async def test_a_proxy_of_the_environment_is_used(server: Recorder, environment: pytest.MonkeyPatch) -> None:
    """Requests go through HTTP_PROXY, unless NO_PROXY names the server."""
    environment.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with S3Store(server.settings()) as store:
        with pytest.raises(StoreUnavailable, match="Connection refused"):
            await store.compare_and_swap("a.json", b"{}", etag=None)
    environment.setenv("NO_PROXY", "127.0.0.1")
    async with S3Store(server.settings()) as store:
        await store.compare_and_swap("a.json", b"{}", etag=None)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("checksums", "sent"), [("when_required", False), ("when_supported", True)])
async def test_checksums_are_sent_where_the_settings_ask(server: Recorder, checksums: str, sent: bool) -> None:
    """Every write carries a checksum header, or none: some stores refuse it."""
    async with S3Store(server.settings(s3_checksums=checksums)) as store:
        await store.put("a.json", b"{}")
        await store.compare_and_swap("a.json", b"{}", etag='"1"')
    assert [("x-amz-checksum-sha256" in request.headers) for request in server.requests] == [sent, sent]


async def test_objects_are_written_as_json(server: Recorder) -> None:
    """Every object but a table has the content type of JSON, and a condition if it is a compare-and-swap."""
    async with S3Store(server.settings()) as store:
        await store.put("a.json", b"{}")
        await store.compare_and_swap("a.json", b"{}", etag=None)
        await store.compare_and_swap("a.json", b"{}", etag='"1"')
        await store.upload("a.json").complete()
    assert {request.headers["content-type"] for request in server.requests} == {"application/json"}
    conditions = [(one.headers.get("if-none-match"), one.headers.get("if-match")) for one in server.requests]
    assert conditions == [(None, None), ("*", None), (None, '"1"'), (None, None)]
    async with S3Store(server.settings()) as store:
        await store.compare_and_swap("a.parquet", b"PAR1", etag=None)
    assert server.requests[-1].headers["content-type"] == "application/vnd.apache.parquet"


class OneObject:
    """The responses of a store with one object, which obeys only some of the headers that condition a write."""

    def __init__(self, *obeyed: str) -> None:
        self._obeyed = obeyed
        self.writes = 0

    def __call__(self, request: Request) -> bytes | None:
        if self.writes and any(header in request.headers for header in self._obeyed):
            return failing(412)
        self.writes += 1
        return None


@pytest.mark.parametrize(("obeyed", "ignored"), [("if-none-match", "If-Match"), ("if-match", "If-None-Match")])
async def test_a_store_that_ignores_conditions_is_not_written(server: Recorder, obeyed: str, ignored: str) -> None:
    """The error names the store, the header and the remedy, and no object is written but the one of the check."""
    server.refuses = False
    server.respond = OneObject(obeyed)
    async with S3Store(server.settings()) as store:
        for call in (store.compare_and_swap("a.json", b"{}", etag=None), store.check()):
            with pytest.raises(UnsafeStore, match=rf"bucket at {server.url} ignores {ignored}: .*'tripfold doctor'"):
                await call
    assert {request.target for request in server.requests} == {f"/bucket/{keys.WRITE_CHECK}"}


async def test_a_check_is_one_request_that_writes_nothing(server: Recorder) -> None:
    """The first check creates its object and finds that conditions count. Each later one is a write that is refused."""
    server.refuses = False
    server.respond = store_of_one = OneObject("if-none-match", "if-match")
    async with S3Store(server.settings()) as store:
        for _ in range(3):
            await store.check()
    conditions = [(one.headers.get("if-none-match"), one.headers.get("if-match")) for one in server.requests]
    assert conditions[:2] == [("*", None)] * 2
    assert conditions[2:] == [(None, NEVER_AN_ETAG)] * 3
    assert store_of_one.writes == 1


@pytest.mark.parametrize("etag", [None, '"1"'])
async def test_a_conditional_write_is_sent_once(server: Recorder, etag: str | None) -> None:
    """A client that repeats a conditional write conflicts with itself; reads are tried a few times."""
    server.respond = lambda _: b"HTTP/1.1 503 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    async with S3Store(server.settings()) as store:
        with pytest.raises(StoreUnavailable, match="503"):
            await store.compare_and_swap("a.json", b"{}", etag=etag)
        assert len(server.requests) == 1
        with pytest.raises(StoreUnavailable, match="503"):
            await store.get("a.json")
    assert len(server.requests) == 4


@pytest.mark.parametrize("etag", [None, '"1"'])
async def test_a_lasting_conflict_is_a_cas_conflict(
    server: Recorder, environment: pytest.MonkeyPatch, etag: str | None
) -> None:
    """A 409 is undecided: the write is retried after a wait, and is a CasConflict if the store never decides."""
    environment.setattr(s3, "CONFLICT_WAITS_S", [wait_s and wait_s / 20 for wait_s in s3.CONFLICT_WAITS_S])
    server.respond = lambda _: b"HTTP/1.1 409 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    async with S3Store(server.settings()) as store:
        with pytest.raises(CasConflict):
            await store.compare_and_swap("a.json", b"{}", etag=etag)
    assert len(server.requests) == 4
    pending = [failing(409), failing(409)]
    server.respond = lambda _: pending.pop() if pending else None
    async with S3Store(server.settings()) as store:
        assert await store.compare_and_swap("a.json", b"{}", etag=etag) == '"1"'
    assert len(server.requests) == 7


@pytest.mark.parametrize(("first_bytes", "sent"), [(None, None), (10, "bytes=0-9")])
async def test_a_read_asks_only_for_the_bytes_that_it_needs(
    server: Recorder, first_bytes: int | None, sent: str | None
) -> None:
    """A read of the first bytes has a range; one of no byte reads the head alone."""
    head = (
        b"HTTP/1.1 206 X\r\nContent-Range: bytes 0-9/99\r\nContent-Length: 10\r\nETag: 7\r\nConnection: close\r\n\r\n"
    )
    server.respond = lambda request: head + b"0123456789" if "range" in request.headers else None
    async with S3Store(server.settings()) as store:
        found = await store.get("a.json", first_bytes=first_bytes)
        assert found == StoredObject(body=b"0123456789" if sent else b"{}", etag="7" if sent else '"1"')
        assert await store.get("a.json", first_bytes=0) == StoredObject(body=b"", etag='"1"')
    assert [(one.method, one.headers.get("range")) for one in server.requests] == [("GET", sent), ("HEAD", None)]


LISTED = [f"raw/day-{number:04}" for number in range(1_005)] + ["raw/week-1", "raw/week-2", "state/a"]


def listing(request: Request) -> bytes:
    """Return a page of LISTED, as S3 does."""
    query = parse_qs(urlsplit(request.target).query)
    prefix, after, token = (query.get(name, [""])[0] for name in ("prefix", "start-after", "continuation-token"))
    found = [key for key in LISTED if key.startswith(prefix) and key > (token or after)]
    page, more = found[:1_000], found[1_000:]
    entries = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2024-05-02T10:00:00.000Z</LastModified>"
        f"<ETag>&quot;{key}&quot;</ETag><Size>7</Size></Contents>"
        for key in page
    )
    rest = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if more else ""
    truncated = "true" if more else "false"
    return responding(
        f"<ListBucketResult><KeyCount>{len(page)}</KeyCount><IsTruncated>{truncated}</IsTruncated>{rest}{entries}"
        "</ListBucketResult>"
    )


@pytest.mark.parametrize(
    ("prefix", "after", "first", "last", "count"),
    [
        ("", "", "raw/day-0000", "state/a", 1_008),
        ("raw/", "", "raw/day-0000", "raw/week-2", 1_007),
        ("raw/", "raw/day-1003", "raw/day-1004", "raw/week-2", 3),
        ("raw/day-", "", "raw/day-0000", "raw/day-1004", 1_005),
        ("raw/day-100", "", "raw/day-1000", "raw/day-1004", 5),
        ("raw/day-100", "raw/day-1001", "raw/day-1002", "raw/day-1004", 3),
        ("raw/week-1", "", "raw/week-1", "raw/week-1", 1),
    ],
)
async def test_a_listing_has_the_keys_of_its_prefix_and_no_other(
    server: Recorder, prefix: str, after: str, first: str, last: str, count: int
) -> None:
    """A prefix may end inside a name; a listing may begin after a key, and it goes on over pages of 1,000 keys."""
    server.respond = listing
    async with S3Store(server.settings()) as store:
        found = [one async for one in store.list(prefix, after=after)]
    at = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
    assert found[0] == ObjectInfo(key=first, etag=f'"{first}"', size_bytes=7, last_modified=at)
    assert (found[-1].key, len(found), len({one.key for one in found})) == (last, count, count)
    assert len(server.requests) <= 3  # two pages, and one after the last key


async def test_a_listing_asks_only_for_its_folder(server: Recorder) -> None:
    """S3 selects by the folder of the prefix, however deep, so that it returns few other keys."""
    server.respond = lambda _: EMPTY_LIST
    async with S3Store(server.settings()) as store:
        assert [one async for one in store.list("raw/date=1/city=2")] == []
    (request,) = server.requests
    assert parse_qs(urlsplit(request.target).query)["prefix"] == ["raw/date=1/"]


async def test_a_listing_that_goes_back_is_an_outage(server: Recorder) -> None:
    """A store that lists a key again after its last one would be listed without end."""
    entry = "<Contents><Key>raw/a</Key><LastModified>2024-05-02T10:00:00.000Z</LastModified><Size>7</Size>"
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entry}<ETag>1</ETag></Contents></ListBucketResult>"
    server.respond = lambda _: responding(body)
    async with S3Store(server.settings()) as store:
        with pytest.raises(StoreUnavailable, match=r"^S3 ListObjectsV2 of raw/: raw/a is listed after raw/a$"):
            await list_all(store)


@pytest.mark.parametrize(
    ("url", "style", "virtual", "endpoint"),
    [
        (None, "auto", True, None),
        (None, "path", False, None),
        ("http://s3.test/x/", "auto", False, "http://s3.test/x"),
        ("http://s3.test/x/", "virtual", True, "http://bucket.s3.test/x"),
        ("http://s3.test/", "virtual", True, "http://bucket.s3.test"),
    ],
)
def test_a_client_has_the_options_of_its_bucket(
    environment: pytest.MonkeyPatch, tmp_path: Path, url: str | None, style: str, virtual: bool, endpoint: str | None
) -> None:
    """AWS has the bucket in the host name by default. A stream may take a day, a connection five seconds."""
    made: list[dict[str, Any]] = []
    environment.setattr(s3, "Obstore", lambda bucket, **options: made.append({"bucket": bucket, **options}))
    environment.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://metadata.test")
    environment.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    (tmp_path / "ca.pem").write_bytes(b"pem")
    given = {"TRIPFOLD_S3_BUCKET": "bucket", "TRIPFOLD_S3_ADDRESSING_STYLE": style, "TRIPFOLD_S3_REGION": "r"}
    environment.setenv("AWS_ENDPOINT_URL", url or "")
    S3Store(load_settings(given))
    expected = {
        "bucket": "bucket",
        "region": "r",
        "disable_bulk_delete": True,
        "virtual_hosted_style_request": virtual,
        "metadata_endpoint": "http://metadata.test",
        "client_options": {
            "allow_http": True,
            "connect_timeout": "5s",
            "read_timeout": "30s",
            "timeout": "1d",
            "pool_idle_timeout": "15s",
            "pool_max_idle_per_host": "32",
            "root_certificate": b"pem",
        },
    } | ({"endpoint": endpoint} if endpoint else {})
    assert made == [{**expected, "retry_config": retries} for retries in (s3.NO_RETRIES, s3.FEW_RETRIES)]


@pytest.mark.parametrize(
    ("given", "environment", "url"),
    [
        ("http://a", {"AWS_ENDPOINT_URL_S3": "http://b"}, "http://a"),
        ("", {"AWS_ENDPOINT_URL_S3": "http://b", "AWS_ENDPOINT_URL": "http://c"}, "http://b"),
        ("", {"AWS_ENDPOINT_URL": "http://c"}, "http://c"),
        ("", {"AWS_ENDPOINT_URL": ""}, None),
    ],
)
def test_the_endpoint_is_that_of_the_settings_or_the_environment(
    given: str, environment: dict[str, str], url: str | None
) -> None:
    """The setting has precedence over the variables of AWS, and the variable for S3 over the general one."""
    assert endpoint_url_of(load_settings({"TRIPFOLD_S3_ENDPOINT_URL": given} if given else {}), environment) == url


def test_the_authorities_are_those_of_the_settings_or_the_environment() -> None:
    """The setting has precedence over the variable of AWS. A file that cannot be read is named."""
    named, unnamed = load_settings({"TRIPFOLD_S3_CA_FILE": "/nowhere/a"}), load_settings({})
    environment = {"AWS_CA_BUNDLE": "/nowhere/b"}
    assert [ca_file_of(one, environment) for one in (named, unnamed)] == ["/nowhere/a", "/nowhere/b"]
    assert ca_file_of(unnamed, {}) == ""
    with pytest.raises(StoreUnavailable, match="in /nowhere/a cannot be read: No such file"):
        S3Store(named)


def test_an_error_without_a_text_is_named_by_its_class() -> None:
    """An operator sees at least what kind of fault it was."""
    assert str(s3._unavailable("GetObject", "a", TimeoutError())) == "S3 GetObject of a: TimeoutError"
