"""Connections of Kafka clients: TLS and SASL settings, and closed connections."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import uvloop
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest
from faststream.kafka.security import parse_security

from shared.kafka.connection import broker_security, connection
from shared.runtime.settings import InvalidSettings, Settings, load_settings

SASL = {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_USERNAME": "worker", "KAFKA_PASSWORD": "open sesame"}


def settings_of(**variables: str) -> Settings:
    """Return settings from variables without their prefix."""
    return load_settings({f"TRIPFOLD_{name}": value for name, value in variables.items()})


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_consumers_and_producers_get_the_same_security(mechanism: str) -> None:
    """FastStream's consumers get the protocol, mechanism, name and password that every other client gets."""
    settings = settings_of(**SASL, KAFKA_SASL_MECHANISM=mechanism)
    told = connection(settings)
    of_consumers = parse_security(broker_security(settings))
    for name in ("security_protocol", "sasl_mechanism", "sasl_plain_username", "sasl_plain_password"):
        assert of_consumers[name] == told[name]
    assert told["sasl_plain_password"] == "open sesame"
    assert of_consumers["ssl_context"] is not None


def test_plain_text_has_no_tls_context_and_no_login() -> None:
    """Without TLS and SASL there is neither a TLS context nor a user name."""
    assert connection(settings_of()) == {"bootstrap_servers": "127.0.0.1:9092", "security_protocol": "PLAINTEXT"}
    assert broker_security(settings_of()) is None


def test_a_password_file_is_read_without_its_line_break(tmp_path: Path) -> None:
    """The line break at the end of the file is no part of the password."""
    file = tmp_path / "password"
    file.write_text("open sesame\n")
    settings = settings_of(**{**SASL, "KAFKA_PASSWORD": "", "KAFKA_PASSWORD_FILE": str(file)})
    assert connection(settings)["sasl_plain_password"] == "open sesame"


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe", b"x" * 100_000])
def test_a_file_that_holds_no_password_is_named(tmp_path: Path, content: bytes | None) -> None:
    """A file that is missing, empty, no text or far too long is refused by its variable and name."""
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    settings = settings_of(**{**SASL, "KAFKA_PASSWORD": "", "KAFKA_PASSWORD_FILE": str(file)})
    with pytest.raises(InvalidSettings, match=r"TRIPFOLD_KAFKA_PASSWORD_FILE=.*password"):
        connection(settings)


@pytest.mark.parametrize("variable", ["KAFKA_CA_FILE", "KAFKA_CERTIFICATE_FILE"])
def test_a_file_that_holds_no_certificate_is_named(tmp_path: Path, variable: str) -> None:
    """Certificates that cannot be read are refused with the file's name."""
    file = tmp_path / "broken.pem"
    file.write_text("not a certificate")
    with pytest.raises(InvalidSettings, match=r"broken\.pem cannot be used"):
        connection(settings_of(KAFKA_SECURITY_PROTOCOL="SSL", **{variable: str(file)}))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({**SASL, "KAFKA_USERNAME": ""}, "TRIPFOLD_KAFKA_USERNAME is empty"),
        ({**SASL, "KAFKA_PASSWORD": ""}, "needs either TRIPFOLD_KAFKA_PASSWORD or TRIPFOLD_KAFKA_PASSWORD_FILE"),
        ({**SASL, "KAFKA_PASSWORD_FILE": "also"}, "not both"),
    ],
)
def test_incomplete_sasl_is_refused(variables: dict[str, str], expected: str) -> None:
    """SASL without a name, without a password or with two is refused, and the password is not in the message."""
    with pytest.raises(InvalidSettings) as refused:
        settings_of(**variables)
    assert expected in str(refused.value)
    assert "sesame" not in str(refused.value)


def test_a_password_is_never_printed() -> None:
    """Neither the text nor the representation of settings shows it."""
    settings = settings_of(**SASL)
    assert "sesame" not in f"{settings} {settings!r} {settings.model_dump()}"


def test_a_closed_connection_raises_an_error_that_aiokafka_expects() -> None:
    """A request on a connection that has just closed raises KafkaConnectionError under uvloop too."""

    async def send() -> None:
        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            kafka = AIOKafkaConnection("127.0.0.1", port)
            kafka._versions = {MetadataRequest.API_KEY: (0, 1)}
            kafka._reader, kafka._writer = await asyncio.open_connection("127.0.0.1", port)
            kafka._read_task = asyncio.create_task(kafka._reader.read())
            kafka._writer.transport.abort()
            await kafka._writer.wait_closed()
            with pytest.raises(KafkaConnectionError, match="closed"):
                kafka.send(MetadataRequest([]))
            assert not kafka.connected()

    uvloop.run(send())
