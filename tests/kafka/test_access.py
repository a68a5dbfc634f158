"""SASL over TLS: who can use a broker that requires a username and a password."""

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
listeners=PLAINTEXT://127.0.0.1:{port},SECURED://127.0.0.1:{secured},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SECURED://127.0.0.1:{secured}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SECURED:SASL_SSL,CONTROLLER:PLAINTEXT
listener.name.secured.ssl.keystore.type=PEM
listener.name.secured.ssl.keystore.location={keystore}
listener.name.secured.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.secured.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required user_{name}="{password}";
listener.name.secured.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secured.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make the authority that signs the broker's certificate."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secured(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a broker with one user; yield the address of its SASL listener."""
    folder = tmp_path_factory.mktemp("secured")
    pem = certificates.server_pem()
    key = load_pem_private_key(pem, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    keystore = folder / "broker.pem"
    keystore.write_bytes(key + pem[pem.index(b"-----BEGIN CERTIFICATE") :])  # Kafka reads only PKCS #8 keys
    secured_port = free_port("Kafka behind passwords")
    port = broker_port()
    properties = folder / "more.properties"
    ports = {"port": port, "controller": port + 1, "secured": secured_port}
    properties.write_text(PROPERTIES.format(**ports, keystore=keystore, name=NAME, password=PASSWORD))
    broker = ApacheKafka(data_dir=folder / "kafka", port=port, advertised_port=port, properties=properties)
    try:
        broker.start()
        create_users(broker.address)
        yield f"127.0.0.1:{secured_port}"
    finally:
        broker.stop()


def create_users(address: str) -> None:
    """Set the user's password for each SCRAM mechanism."""
    admin = AdminClient({"bootstrap.servers": address})
    users = [
        UserScramCredentialUpsertion(NAME, ScramCredentialInfo(mechanism, 4096), PASSWORD.encode())
        for mechanism in MECHANISMS.values()
    ]
    for user in users:  # a request may contain a user only once
        for done in admin.alter_user_scram_credentials([user]).values():
            done.result(30)


def settings_of(address: str, certificates: Certificates, mechanism: str, password: str = PASSWORD) -> Settings:
    """Return settings with the user and a unique topic prefix."""
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
async def test_the_right_password_is_accepted(secured: str, certificates: Certificates, mechanism: str) -> None:
    """Provisioning, publishing, consuming in a group and replaying all authenticate."""
    settings = settings_of(secured, certificates, mechanism)
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
async def test_a_wrong_password_is_refused(secured: str, certificates: Certificates, mechanism: str) -> None:
    """A wrong password counts as an outage of Kafka, and the error does not contain the password."""
    settings = settings_of(secured, certificates, mechanism, password="close sesame")
    async with KafkaPublisher(settings, source="test") as publisher:
        with pytest.raises(KafkaUnavailable) as refused:
            await publisher.check()
    assert secured in str(refused.value)
    assert "sesame" not in str(refused.value)
