"""Connections of Kafka clients: options for brokers, TLS and SASL, and a correction of aiokafka."""

from __future__ import annotations

from typing import Any

from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError, KafkaError
from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512

from shared.runtime.settings import Settings, secret_value, tls_client_context

_SASL = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}


def connection(settings: Settings) -> dict[str, Any]:
    """Return the arguments of every aiokafka client: brokers, TLS and SASL.

    Raises InvalidSettings if a file that the settings name cannot be used.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers,
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_uses_tls:
        options["ssl_context"] = tls_client_context(
            settings.kafka_ca_file,
            certificate_file=settings.kafka_certificate_file,
            key_file=settings.kafka_certificate_key_file,
        )
    if settings.kafka_uses_sasl:
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_username
        options["sasl_plain_password"] = secret_value(
            settings.kafka_password, settings.kafka_password_file, "TRIPFOLD_KAFKA_PASSWORD_FILE"
        )
    return options


def broker_security(settings: Settings) -> BaseSecurity | None:
    """Return the security options of a FastStream broker. Raises InvalidSettings as `connection` does."""
    options = connection(settings)
    context = options.get("ssl_context")
    if settings.kafka_uses_sasl:
        return _SASL[settings.kafka_sasl_mechanism](
            options["sasl_plain_username"], options["sasl_plain_password"], ssl_context=context
        )
    return BaseSecurity(ssl_context=context) if context else None


_send = AIOKafkaConnection.send


def _send_or_raise_kafka_error(self: AIOKafkaConnection, *arguments: Any, **options: Any) -> Any:
    """Send a request. Raises KafkaConnectionError on a closed connection.

    There uvloop raises RuntimeError, which aiokafka 0.14 does not expect. It would end the task that keeps a client's
    metadata up to date, and the client would wait for metadata for good.
    """
    try:
        return _send(self, *arguments, **options)
    except KafkaError:  # a RuntimeError too
        raise
    except RuntimeError as error:
        self.close(reason=CloseReason.CONNECTION_BROKEN)
        raise KafkaConnectionError(f"the connection is closed: {error}") from error


AIOKafkaConnection.send = _send_or_raise_kafka_error
