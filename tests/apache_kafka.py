"""A real Apache Kafka for tests, by ``scripts/apache-kafka``; and the program behind ``make test-kafka``.

    python -m tests.apache_kafka [--only-integration] [ARGUMENTS FOR PYTEST]

It starts a broker on a free port with a data directory of its own, runs tests/integration against it and then
tests/kafka, which starts and stops that broker, and stops it at the end, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tests import ROOT
from tripfold.local.ports import free_port

SCRIPT = ROOT / "scripts" / "apache-kafka"
BOOTSTRAP_VARIABLE = "TRIPFOLD_TEST_KAFKA_BOOTSTRAP_SERVERS"
REAL_VARIABLE = "TRIPFOLD_TEST_REAL_KAFKA"
"""Set to 1, it lets tests/kafka run: they start brokers of their own."""
ONLY_INTEGRATION = "--only-integration"
PORT_TRIES_MAX = 50
COMMAND_DEADLINE_S = 240.0
FETCH_DEADLINE_S = 1800.0


class NoApacheKafka(RuntimeError):
    """This machine cannot run the broker, or it did not start; the message is the script's."""


class ApacheKafka(msgspec.Struct, frozen=True, kw_only=True):
    """One broker: where its data is, where it listens, where it tells clients to find it, and properties of its own."""

    data_dir: Path
    port: int
    advertised_port: int
    properties: Path | None = None

    @property
    def address(self) -> str:
        """Where clients find it."""
        return f"127.0.0.1:{self.advertised_port}"

    def start(self) -> None:
        """Start it, and return once it is ready. Raises NoApacheKafka."""
        place = ("--data-dir", str(self.data_dir), "--port", str(self.port))
        more = () if self.properties is None else ("--properties", str(self.properties))
        _script("start", *place, "--advertised-port", str(self.advertised_port), *more)

    def stop(self) -> None:
        """Stop it as its operator would; its data stays."""
        _script("stop", "--data-dir", str(self.data_dir))

    def kill(self) -> None:
        """Kill it with -9, as a power cut would, and wait for its end."""
        pid = int((self.data_dir / "kafka.pid").read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.stop()


def reason_unavailable() -> str | None:
    """Return why this machine cannot run the broker, or None if it can."""
    try:
        _script("fetch", deadline_s=FETCH_DEADLINE_S)
    except NoApacheKafka as error:
        return str(error)
    return None


def broker_port() -> int:
    """Choose a free port whose next one, for the controller, is free too."""
    for _ in range(PORT_TRIES_MAX):
        # A process gets the ports in order, and each once: the next one is nobody else's.
        port = free_port("Apache Kafka")
        if free_port("Apache Kafka's controller") == port + 1:
            return port
    raise RuntimeError(f"no two free ports side by side in {PORT_TRIES_MAX} tries")


@contextlib.contextmanager
def apache_kafka(data_dir: Path, *, advertised_port: int | None = None) -> Iterator[ApacheKafka]:
    """Run a broker on ``data_dir`` while the block lasts. Raises NoApacheKafka."""
    port = broker_port()
    broker = ApacheKafka(data_dir=data_dir, port=port, advertised_port=advertised_port or port)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def _script(*arguments: str, deadline_s: float = COMMAND_DEADLINE_S) -> None:
    # A session of its own: Ctrl-C in a terminal reaches whoever has to stop the broker, not the broker first.
    done = subprocess.run(
        [SCRIPT, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=deadline_s,
        start_new_session=True,
    )
    if done.returncode:
        raise NoApacheKafka(done.stderr.strip())


def run_pytest(*arguments: str, **environment: str) -> int:
    """Run pytest with these variables in a process of its own; return its exit code once it has ended in order."""
    command = [sys.executable, "-m", "pytest", *arguments]
    running = subprocess.Popen(command, env={**os.environ, **environment})
    # Whoever ends this process alone means pytest too.
    before = signal.signal(signal.SIGTERM, lambda *_: running.send_signal(signal.SIGINT))
    try:
        return running.wait()
    except KeyboardInterrupt:
        # The terminal has sent it to pytest too, which ends its own processes first.
        return running.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if running.poll() is None:
            running.kill()


def main(arguments: list[str]) -> int:
    """Run both suites, or the first alone; return the exit code of the first that failed, or 0."""
    assert threading.current_thread() is threading.main_thread()
    only_integration = arguments[:1] == [ONLY_INTEGRATION]
    arguments = arguments[only_integration:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reason = reason_unavailable()
    if reason is not None:
        sys.stderr.write(f"test-kafka: {reason}\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="tripfold-kafka-", ignore_cleanup_errors=True) as directory:
        try:
            with apache_kafka(Path(directory) / "kafka") as broker:
                failed = run_pytest("tests/integration", *arguments, **{BOOTSTRAP_VARIABLE: broker.address})
        except NoApacheKafka as error:
            sys.stderr.write(f"test-kafka: {error}\n")
            return 1
    if failed or only_integration:
        return failed
    # One process: the tests share a system, and stop its broker.
    return run_pytest("tests/kafka", *arguments, "-n0", **{REAL_VARIABLE: "1"})


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
