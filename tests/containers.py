"""Run the integration tests against a real Apache Kafka in a container.

    python -m tests.containers [ARGUMENTS FOR PYTEST]

The image is the one that docker-compose.yml runs, or TRIPFOLD_KAFKA_IMAGE. The tests find the broker by the variable
TRIPFOLD_TEST_KAFKA_BOOTSTRAP_SERVERS; their S3 store is the one they always use.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from docker.errors import DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

BOOTSTRAP_VARIABLE = "TRIPFOLD_TEST_KAFKA_BOOTSTRAP_SERVERS"
COMPOSE_FILE = Path(__file__).parents[1] / "docker-compose.yml"
START_DEADLINE_S = 60
HOST_PORT = 9092
ADDRESS_FILE = "/tmp/advertised-address"

SETTINGS = {
    "CLUSTER_ID": "dHJpcGZvbGQta2Fma2EtMQ",
    "KAFKA_NODE_ID": "1",
    "KAFKA_PROCESS_ROLES": "broker,controller",
    "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
    "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
    "KAFKA_LISTENERS": f"BROKER://:19092,HOST://:{HOST_PORT},CONTROLLER://:9093",
    "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "BROKER:PLAINTEXT,HOST:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "KAFKA_INTER_BROKER_LISTENER_NAME": "BROKER",
    "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
    "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
    "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
    "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "1",
    "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
    "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
    "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR": "1",
    "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR": "1",
    "KAFKA_HEAP_OPTS": "-Xms128m -Xmx512m",
}

# A broker tells its clients where to find it, and the port is known only once the container has been started.
WAIT_FOR_ADDRESS_THEN_RUN = f"""
until [ -s {ADDRESS_FILE} ]; do sleep 0.1; done
export KAFKA_ADVERTISED_LISTENERS="BROKER://localhost:19092,HOST://$(cat {ADDRESS_FILE})"
exec /etc/kafka/docker/run
"""


def kafka_image() -> str:
    """Return the image to run: TRIPFOLD_KAFKA_IMAGE, or else the one of docker-compose.yml."""
    pinned = re.search(r"\$\{TRIPFOLD_KAFKA_IMAGE:-([^}]+)\}", COMPOSE_FILE.read_text(encoding="utf-8"))
    assert pinned is not None, f"{COMPOSE_FILE} names no image by TRIPFOLD_KAFKA_IMAGE"
    return os.environ.get("TRIPFOLD_KAFKA_IMAGE", pinned[1])


@contextmanager
def apache_kafka() -> Iterator[str]:
    """Run a single broker while the block lasts, and yield its bootstrap address.

    Raises DockerException if there is no Docker engine or no image, and TimeoutError, with the broker's log, if it is
    not ready in time.
    """
    container = (
        DockerContainer(kafka_image())
        .with_exposed_ports(HOST_PORT)
        .with_envs(**SETTINGS)
        .with_command(["bash", "-c", WAIT_FOR_ADDRESS_THEN_RUN])
    )
    with container:
        address = f"{container.get_container_host_ip()}:{container.get_exposed_port(HOST_PORT)}"
        container.copy_into_container(address.encode(), ADDRESS_FILE)
        started = LogMessageWaitStrategy("Kafka Server started").with_startup_timeout(START_DEADLINE_S)
        started.wait_until_ready(container)
        yield address


def main(arguments: list[str]) -> int:
    """Run tests/integration, and whatever else ``arguments`` say to pytest; return pytest's exit code."""
    try:
        with apache_kafka() as address:
            os.environ[BOOTSTRAP_VARIABLE] = address
            return int(pytest.main(["tests/integration", *arguments]))
    except DockerException as error:
        sys.stderr.write(f"tests.containers: Apache Kafka could not be run in Docker: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
