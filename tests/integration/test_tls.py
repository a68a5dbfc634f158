"""TLS to Kafka, S3 and the upstream, with certificates made for the occasion."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from services.aggregate.replay.topic_reader import KafkaTopicReader
from shared.domain.events import encode
from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.kafka.producer import KafkaPublisher, KafkaUnavailable
from shared.kafka.records import OutgoingEvent
from shared.runtime.settings import Settings, load_settings
from shared.storage.object_store import StoreUnavailable
from shared.storage.s3 import S3Store
from tests.fakes.builders import STATS
from tests.integration.certificates import Certificates
from tests.integration.services.ingest.upstream.client import BODY, GOOD, VirtualRetrier, client_of
from tests.integration.services.ingest.upstream.hostile import HostileServer
from tripfold.local.embedded import EmbeddedServices
from tripfold.local.long_poll import Relay
from tripfold.local.ports import free_port

HOST = "127.0.0.1"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make the authority that everybody in this module is told to trust."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def another_authority(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make an authority that vouches for nobody here."""
    return Certificates(tmp_path_factory.mktemp("others"))


@contextlib.asynccontextmanager
async def listening(port: int, handler: Handler, context: ssl.SSLContext) -> AsyncIterator[None]:
    """Serve TLS on a port for as long as the context is open."""
    server = await asyncio.start_server(handler, HOST, port, ssl=context)
    try:
        yield
    finally:
        server.close()


def forward_to(port: int) -> Handler:
    """Return what passes a connection on to a port of this machine, byte for byte."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65_536):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(HOST, port)
        await asyncio.gather(copy(reader, forth), copy(back, writer))

    return handle


@contextlib.asynccontextmanager
async def tls_kafka(embedded: EmbeddedServices, context: ssl.SSLContext) -> AsyncIterator[str]:
    """Put TLS before the embedded broker; give the address to begin with."""
    broker_port = int(embedded.kafka_bootstrap_servers.rpartition(":")[2])
    port = free_port("Kafka behind TLS")
    async with listening(port, Relay(HOST, port, broker_port).relay, context):
        yield f"{HOST}:{port}"


def kafka_settings(address: str, **changes: object) -> Settings:
    """Return settings for Kafka behind TLS with topics of their own."""
    given = {"bootstrap_servers": address, "security_protocol": "SSL", "partitions": 1, **changes}
    environment = {f"TRIPFOLD_KAFKA_{name}".upper(): str(value) for name, value in given.items()}
    return load_settings({**environment, "TRIPFOLD_TOPIC_PREFIX": f"t{uuid.uuid4().hex[:12]}."})


async def test_kafka_clients_use_mutual_tls(embedded: EmbeddedServices, certificates: Certificates) -> None:
    """Provisioning, publishing and consuming all show the client's certificate, and check the broker's."""
    context = certificates.server(asks_for_a_certificate=True)
    async with tls_kafka(embedded, context) as address:
        settings = kafka_settings(address, ca_file=certificates.ca_file, certificate_file=certificates.client_file)
        await apply_topics(settings)
        async with KafkaPublisher(settings, source="test") as publisher:
            await publisher.check()
            await publisher.publish([OutgoingEvent(STATS)])
        replay = KafkaTopicReader(settings, Topic.CITY_STATS)
        try:
            assert await replay.take_end() == 1
            records = [record async for batch in replay.read() for record in batch]
        finally:
            await replay.close()
        assert [record.value for record in records] == [encode(STATS)]


async def test_a_broker_with_an_untrusted_certificate_is_unreachable(
    embedded: EmbeddedServices, certificates: Certificates, another_authority: Certificates
) -> None:
    """A broker whose certificate another authority made counts as out of reach."""
    async with tls_kafka(embedded, certificates.server()) as address:
        settings = kafka_settings(address, ca_file=another_authority.ca_file)
        async with KafkaPublisher(settings, source="test") as publisher:
            with pytest.raises(KafkaUnavailable, match=address):
                await publisher.check()


async def test_the_bucket_is_reached_over_tls(
    embedded: EmbeddedServices, certificates: Certificates, another_authority: Certificates
) -> None:
    """Objects are written and read over TLS; a server that the wrong authority vouches for is unavailable."""
    port = free_port("S3 behind TLS")
    s3_port = int(embedded.s3_endpoint_url.rpartition(":")[2])

    def trusting(authority: Certificates) -> Settings:
        return load_settings(
            {
                "TRIPFOLD_S3_ENDPOINT_URL": f"https://{HOST}:{port}",
                "TRIPFOLD_S3_BUCKET": f"b{uuid.uuid4().hex}",
                "TRIPFOLD_S3_CA_FILE": str(authority.ca_file),
            }
        )

    async with listening(port, forward_to(s3_port), certificates.server()):
        async with S3Store(trusting(certificates)) as store:
            await store.create_bucket()
            await store.put("raw/1", b"[]")
            found = await store.get("raw/1")
            assert found is not None
            assert found.body == b"[]"
        async with S3Store(trusting(another_authority)) as store:
            with pytest.raises(StoreUnavailable, match=r"(?i)certificate|ssl"):
                await store.check()


async def test_a_file_is_downloaded_over_tls(certificates: Certificates) -> None:
    """An https upstream whose authority the settings name is trusted."""
    async with (
        HostileServer(GOOD, tls=certificates.server()) as server,
        client_of(server.url, ca_file=str(certificates.ca_file)) as client,
    ):
        await client.fetch_exactly(BODY)


async def test_an_upstream_with_an_untrusted_certificate_is_an_outage(
    certificates: Certificates, another_authority: Certificates
) -> None:
    """The client sends no request to an https upstream whose certificate authority is not the named one."""
    async with (
        HostileServer(GOOD, tls=certificates.server()) as server,
        client_of(server.url, VirtualRetrier(), outage_limit_s=0.3, ca_file=str(another_authority.ca_file)) as client,
    ):
        assert "CERTIFICATE_VERIFY_FAILED" in await client.failure()
        assert not server.requests
