"""Apache Kafka for tests, run by ``scripts/apache-kafka``; also the program of ``make test-kafka``.

    python -m tests.apache_kafka [--only-integration] [ARGUMENTS FOR PYTEST]

It starts a broker on a free port with its own data directory, runs tests/integration and tests/upgrade against it, and
stops it. Then it runs tests/kafka, which starts and stops its own brokers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from tests import ROOT
from tripfold.local.ports import free_port

SCRIPT = ROOT / "scripts" / "apache-kafka"
BOOTSTRAP_VARIABLE = "TRIPFOLD_TEST_KAFKA_BOOTSTRAP_SERVERS"
REAL_VARIABLE = "TRIPFOLD_TEST_REAL_KAFKA"
"""Set to 1 to run tests/kafka, which starts its own brokers."""
PORT_TRIES_MAX = 50
COMMAND_DEADLINE_S = 240.0
FETCH_DEADLINE_S = 1800.0


class NoApacheKafka(RuntimeError):
    """This machine cannot run the broker, or the broker did not start; the message is the script's."""


class ApacheKafka(msgspec.Struct, frozen=True, kw_only=True):
    """A broker: its data directory, its port, the port that it advertises, and a file of more properties."""

    data_dir: Path
    port: int
    advertised_port: int
    properties: Path | None = None

    @property
    def address(self) -> str:
        """The bootstrap address for clients."""
        return f"127.0.0.1:{self.advertised_port}"

    def start(self) -> None:
        """Start the broker, and return once it is ready. Raises NoApacheKafka."""
        place = ("--data-dir", str(self.data_dir), "--port", str(self.port))
        more = () if self.properties is None else ("--properties", str(self.properties))
        _script("start", *place, "--advertised-port", str(self.advertised_port), *more)

    def stop(self) -> None:
        """Stop the broker gracefully; its data stays."""
        _script("stop", "--data-dir", str(self.data_dir))

    def lose_data(self) -> None:
        """Delete the data of a stopped broker; it starts as an empty one."""
        shutil.rmtree(self.data_dir / "logs")

    def kill(self) -> None:
        """Kill the broker with SIGKILL, and wait until it has exited."""
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
    """Return a free port whose next port, for the controller, is free too."""
    for _ in range(PORT_TRIES_MAX):
        # free_port hands out ports in order and each once, so no other caller has the next one.
        port = free_port("Apache Kafka")
        if free_port("Apache Kafka's controller") == port + 1:
            return port
    raise RuntimeError(f"found no two adjacent free ports in {PORT_TRIES_MAX} attempts")


def cluster(directory: Path, *, advertised_ports: Sequence[int]) -> tuple[ApacheKafka, ...]:
    """Return brokers that form a cluster once they are started together; each advertises a port of its own.

    Among themselves they use further ports, so a relay in front of the advertised ones cannot part them.
    """
    ports = [broker_port() for _ in advertised_ports]
    voters = ",".join(f"{node}@127.0.0.1:{port + 1}" for node, port in enumerate(ports, 1))
    directory.mkdir(parents=True)
    brokers = []
    for node, (port, advertised_port) in enumerate(zip(ports, advertised_ports, strict=True), 1):
        properties = directory / f"{node}.properties"
        properties.write_text(_properties(node, voters, port, advertised_port, len(ports)))
        data_dir = directory / str(node)
        brokers.append(
            ApacheKafka(data_dir=data_dir, port=port, advertised_port=advertised_port, properties=properties)
        )
    return tuple(brokers)


def _properties(node: int, voters: str, port: int, advertised_port: int, size: int) -> str:
    internal = f"INTERNAL://127.0.0.1:{free_port('Apache Kafka among brokers')}"
    replicas, in_sync = min(3, size), min(2, size)
    return f"""
node.id={node}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{port + 1},{internal}
advertised.listeners=PLAINTEXT://127.0.0.1:{advertised_port},{internal}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,INTERNAL:PLAINTEXT
inter.broker.listener.name=INTERNAL
offsets.topic.replication.factor={replicas}
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={in_sync}
"""


@contextlib.contextmanager
def apache_kafka(data_dir: Path, *, advertised_port: int | None = None) -> Iterator[ApacheKafka]:
    """Run a broker on ``data_dir`` during the block. Raises NoApacheKafka."""
    port = broker_port()
    broker = ApacheKafka(data_dir=data_dir, port=port, advertised_port=advertised_port or port)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def _script(*arguments: str, deadline_s: float = COMMAND_DEADLINE_S) -> None:
    # In its own session the broker gets no Ctrl-C from the terminal; the tests stop it.
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
    """Run pytest with these variables in a subprocess; return its exit code."""
    command = [sys.executable, "-m", "pytest", *arguments]
    running = subprocess.Popen(command, env={**os.environ, **environment})
    # Pass SIGTERM on to pytest as Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda *_: running.send_signal(signal.SIGINT))
    try:
        return running.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to pytest too; wait until pytest has stopped its processes.
        return running.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if running.poll() is None:
            running.kill()


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows ``--help``. It leaves the arguments for pytest to its caller."""
    text = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=text, allow_abbrev=False
    )


def main(arguments: list[str]) -> int:
    """Run both suites, or only the first; return the exit code of the first that failed, or 0."""
    assert threading.current_thread() is threading.main_thread()
    parser = parser_of("tests.apache_kafka", __doc__)
    parser.add_argument("--only-integration", action="store_true")
    options, arguments = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reason = reason_unavailable()
    if reason is not None:
        sys.stderr.write(f"test-kafka: {reason}\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="tripfold-kafka-", ignore_cleanup_errors=True) as directory:
        try:
            with apache_kafka(Path(directory) / "kafka") as broker:
                suites = ("tests/integration", "tests/upgrade")
                failed = run_pytest(*suites, *arguments, **{BOOTSTRAP_VARIABLE: broker.address})
        except NoApacheKafka as error:
            sys.stderr.write(f"test-kafka: {error}\n")
            return 1
    if failed or options.only_integration:
        return failed
    # These tests share one system and stop its broker, so they run in one process.
    return run_pytest("tests/kafka", *arguments, "-n0", **{REAL_VARIABLE: "1"})


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
