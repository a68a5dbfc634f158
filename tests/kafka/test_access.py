"""Names and passwords: what a broker that asks for them lets in, over TLS."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from services.aggregate.replay.topic_reader import KafkaTopicReader
from shared.domain.events import encode
from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.kafka.producer import KafkaPublisher, KafkaUnavailable
from shared.kafka.records import OutgoingEvent
from shared.runtime.settings import Settings, load_settings
from tests.apache_kafka import ApacheKafka, broker_port
from tests.fakes.builders import STATS
from tests.integration.certificates import Certificates
from tests.integration.consuming import Collector, consuming
from tests.integration.running import eventually
from tripfold.local.ports import free_port

NAME, PASSWORD = "tripfold", "open sesame"
MECHANISMS = {"SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256, "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512}

PROPERTIES = """\
listeners=PLAINTEXT://127.0.0.1:{port},GUARDED://127.0.0.1:{guarded},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},GUARDED://127.0.0.1:{guarded}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,GUARDED:SASL_SSL,CONTROLLER:PLAINTEXT
listener.name.guarded.ssl.keystore.type=PEM
listener.name.guarded.ssl.keystore.location={keystore}
listener.name.guarded.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.guarded.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required user_{name}="{password}";
listener.name.guarded.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.guarded.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make the authority that vouches for the broker."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def guarded(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a broker that knows one user; give the address at which it asks who comes."""
    folder = tmp_path_factory.mktemp("guarded")
    pem = certificates.server_pem()
    key = load_pem_private_key(pem, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    keystore = folder / "broker.pem"
    keystore.write_bytes(key + pem[pem.index(b"-----BEGIN CERTIFICATE") :])  # Kafka reads no other form of a key
    guarded_port = free_port("Kafka behind passwords")
    port = broker_port()
    properties = folder / "more.properties"
    ports = {"port": port, "controller": port + 1, "guarded": guarded_port}
    properties.write_text(PROPERTIES.format(**ports, keystore=keystore, name=NAME, password=PASSWORD))
    broker = ApacheKafka(data_dir=folder / "kafka", port=port, advertised_port=port, properties=properties)
    try:
        broker.start()
        make_users(broker.address)
        yield f"127.0.0.1:{guarded_port}"
    finally:
        broker.stop()


def make_users(address: str) -> None:
    """Give the user a password for each mechanism that keeps its own."""
    admin = AdminClient({"bootstrap.servers": address})
    users = [
        UserScramCredentialUpsertion(NAME, ScramCredentialInfo(mechanism, 4096), PASSWORD.encode())
        for mechanism in MECHANISMS.values()
    ]
    for user in users:  # one at a time: a request may name a user once
        for done in admin.alter_user_scram_credentials([user]).values():
            done.result(30)


def settings_of(address: str, certificates: Certificates, mechanism: str, password: str = PASSWORD) -> Settings:
    """Return settings that name the user, with topics of their own."""
    return load_settings(
        {
            "TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": address,
            "TRIPFOLD_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "TRIPFOLD_KAFKA_CA_FILE": str(certificates.ca_file),
            "TRIPFOLD_KAFKA_SASL_MECHANISM": mechanism,
            "TRIPFOLD_KAFKA_USERNAME": NAME,
            "TRIPFOLD_KAFKA_PASSWORD": password,
            "TRIPFOLD_KAFKA_PARTITIONS": "1",
            "TRIPFOLD_TOPIC_PREFIX": f"t{uuid.uuid4().hex[:12]}.",
        }
    )


@pytest.mark.parametrize("mechanism", ["PLAIN", *MECHANISMS])
async def test_whoever_knows_the_password_gets_in(guarded: str, certificates: Certificates, mechanism: str) -> None:
    """Provisioning, publishing, consuming in a group and replaying all show the name and the password."""
    settings = settings_of(guarded, certificates, mechanism)
    await apply_topics(settings)
    async with KafkaPublisher(settings, source="test") as publisher:
        await publisher.check()
        await publisher.publish([OutgoingEvent(STATS)])
    collector = Collector()
    async with consuming(settings, Topic.CITY_STATS, collector):
        await eventually(lambda: collector.has(1), "the event to be consumed")
    replay = KafkaTopicReader(settings, Topic.CITY_STATS)
    try:
        assert await replay.take_end() == 1
        replayed = [record.value async for batch in replay.read() for record in batch]
    finally:
        await replay.close()
    assert [record.value for record in collector.seen] == replayed == [encode(STATS)]


@pytest.mark.parametrize("mechanism", ["PLAIN", *MECHANISMS])
async def test_a_wrong_password_gets_nobody_in(guarded: str, certificates: Certificates, mechanism: str) -> None:
    """The service sees Kafka as unavailable, and goes on waiting; the password is not in the message."""
    settings = settings_of(guarded, certificates, mechanism, password="close sesame")
    async with KafkaPublisher(settings, source="test") as publisher:
        with pytest.raises(KafkaUnavailable) as refused:
            await publisher.check()
    assert guarded in str(refused.value)
    assert "sesame" not in str(refused.value)
