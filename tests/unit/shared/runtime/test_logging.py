"""Structured logs: repeated messages of libraries, and secrets."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog
from aiokafka.protocol.admin import SaslAuthenticateRequest_v0

from shared.runtime.logging import REPEATED_AFTER_S, RepeatFilter, configure_logging
from shared.runtime.settings import Settings


def test_a_repeated_message_of_a_library_is_logged_once_per_interval() -> None:
    """The filter compares messages without their arguments; other messages and other loggers always pass."""
    now_s = 100.0
    repeat_filter = RepeatFilter("aiokafka", clock=lambda: now_s)

    def passes(name: str, message: str, *arguments: object) -> bool:
        return repeat_filter.filter(logging.LogRecord(name, logging.ERROR, "", 0, message, arguments, None))

    assert passes("aiokafka.conn", "no connection to %s", 1)
    assert not passes("aiokafka.conn", "no connection to %s", 2)
    assert passes("aiokafka.conn", "something else")
    assert all(passes("shared.runtime.retry", "retrying") for _ in range(3))
    now_s += REPEATED_AFTER_S
    assert passes("aiokafka.conn", "no connection to %s", 1)


@pytest.fixture
def _restored_logging() -> Iterator[None]:
    """Restore logging after a test that configures it."""
    root, configured = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**configured)


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
@pytest.mark.usefixtures("_restored_logging")
def test_the_kafka_password_is_never_logged(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Aiokafka logs requests at debug level, and a SASL login request holds the password in clear text."""
    configure_logging(Settings(log_level=level))  # type: ignore[arg-type]  # validated
    login = SaslAuthenticateRequest_v0(b"\0tripfold\0open sesame")
    logging.getLogger("aiokafka.conn").debug("Request to %s:%d %d: %s", "127.0.0.1", 9092, 3, login)
    logging.getLogger("aiokafka.conn").error("no connection to %s:%d", "127.0.0.1", 9092)
    written = capsys.readouterr().err
    assert "no connection to 127.0.0.1:9092" in written
    assert "sesame" not in written
