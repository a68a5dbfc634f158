"""An upstream that is unreachable, or has an untrusted certificate."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from collections import Counter
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.ingest.upstream import client as upstream_client
from services.ingest.upstream.retry import UpstreamRetryPolicy
from tests.integration.services.ingest.upstream.client import (
    BODY,
    GOOD,
    VirtualRetrier,
    client_of,
    redirect,
    retried,
)
from tests.integration.services.ingest.upstream.hostile import (
    Connection,
    HostileServer,
    Request,
    head_of,
    raw,
)


def self_signed(folder: Path) -> ssl.SSLContext:
    """Make an untrusted certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    start = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    certificate = (
        builder.not_valid_before(start).not_valid_after(start + dt.timedelta(days=2)).sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8
    path = folder / "server.pem"
    path.write_bytes(key.private_bytes(pem, plain, serialization.NoEncryption()) + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


async def test_an_untrusted_certificate_is_an_outage(tmp_path: Path) -> None:
    """Without trust no request is sent; the city fails with this reason once the outage is too long."""
    async with (
        HostileServer(GOOD, tls=self_signed(tmp_path)) as server,
        client_of(server.url, VirtualRetrier(), outage_limit_s=0.3) as client,
    ):
        assert "CERTIFICATE_VERIFY_FAILED" in await client.failure()
        assert not server.requests


async def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go to the upstream directly, whatever the proxy variables say."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    async with HostileServer(GOOD) as server, client_of(server.url, attempts=1) as client:
        await client.fetch_exactly(BODY)


@pytest.mark.parametrize("url", ["http://no-such-host.invalid", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
async def test_an_upstream_that_cannot_be_reached_costs_no_attempt(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve, a closed port and a port without TLS are outages, retried up to the limit."""
    monkeypatch.setattr(upstream_client, "CONNECT_TIMEOUT_S", 0.1)
    async with (
        HostileServer(raw(b"not TLS\r\n")) as server,
        client_of(url.format(port=server.port), VirtualRetrier(), attempts=1, outage_limit_s=30) as client,
    ):
        reason = await client.failure()
        assert "cannot be reached" in reason
        assert "(1 attempts)" not in reason
        assert client.attempts > 1
        assert client.retrier.health.faults.keys() == {"upstream"}


async def test_a_city_whose_host_alone_is_down_fails_while_others_are_served() -> None:
    """Successful downloads of other files do not restart a host's outage: its city fails after the outage limit."""

    async def one_elsewhere(request: Request, connection: Connection) -> None:
        answer = redirect("http://127.0.0.1:1/") if request.target.startswith("/cities/1/") else GOOD
        await answer(request, connection)

    async with (
        HostileServer(one_elsewhere) as server,
        client_of(server.url, redirect_hosts="127.0.0.1:1", outage_limit_s=2) as client,
    ):
        patient = UpstreamRetryPolicy(client.retry_policy._circuit, attempts_max=1, outage_limit_s=60)
        failing = asyncio.create_task(client.failure())
        async with asyncio.timeout(30):
            while not failing.done():
                await retried(patient, client.retrier, partial(client.attempt, "2"))
                client.store.objects.clear()
        assert "cannot be reached" in await failing


async def test_tiny_chunks_leave_turns_to_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one byte cost the HTTP client much work for each byte. It handles some thousand of them at a time."""
    chunks_by_turn: Counter[int] = Counter()
    turn = 0
    feed = aiohttp.StreamReader.feed_data

    def counted(reader: aiohttp.StreamReader, data: bytes, size: int = 0) -> bool:
        chunks_by_turn[turn] += 1
        return feed(reader, data, size)

    async def watch() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(aiohttp.StreamReader, "feed_data", counted)
    body = b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n"
    async with (
        HostileServer(raw(head_of(transfer_encoding="chunked") + body)) as server,
        client_of(server.url) as client,
    ):
        watching = asyncio.create_task(watch())
        taken: list[int] = []
        await client.drain(taken)
        watching.cancel()
    assert sum(taken) == 200_000
    assert max(chunks_by_turn.values()) < 8_000
