"""Run the integration tests, and faults of the network, on what Docker runs: Apache Kafka, an S3 store, a proxy.

    python -m tests.containers [ARGUMENTS FOR PYTEST]

Kafka and the store are the images that docker-compose.yml runs, or TRIPFOLD_KAFKA_IMAGE and TRIPFOLD_S3_IMAGE. The
proxy is Toxiproxy, or TRIPFOLD_PROXY_IMAGE: both can also be reached through it, and tests/network lets it break off,
delay and swallow what passes. Where all of them are, the tests find in the variables of ``Containers.environment``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import msgspec
import pytest
from docker.errors import DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import HttpWaitStrategy, LogMessageWaitStrategy

from services.local.embedded import BUCKET
from tests.integration.conftest import KAFKA_VARIABLE, S3_VARIABLE
from tests.network.toxiproxy import PROXIED_KAFKA_VARIABLE, PROXIED_S3_VARIABLE, TOXIPROXY_VARIABLE, Toxiproxy

COMPOSE_FILE = Path(__file__).parents[1] / "docker-compose.yml"
PROXY_IMAGE = "ghcr.io/shopify/toxiproxy:2.12.0"
START_DEADLINE_S = 60

KAFKA_PORT = 9092
KAFKA_PORT_BEHIND_PROXY = 9094
S3_PORT = 8333
PROXY_API_PORT = 8474
PROXIED_KAFKA_PORT = 20000
PROXIED_S3_PORT = 20001

ADDRESSES_FILE = "/tmp/advertised-addresses"
KAFKA_SETTINGS = {
    "CLUSTER_ID": "dHJpcGZvbGQta2Fma2EtMQ",
    "KAFKA_NODE_ID": "1",
    "KAFKA_PROCESS_ROLES": "broker,controller",
    "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
    "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
    "KAFKA_LISTENERS": (f"BROKER://:19092,HOST://:{KAFKA_PORT},PROXY://:{KAFKA_PORT_BEHIND_PROXY},CONTROLLER://:9093"),
    "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": ("BROKER:PLAINTEXT,HOST:PLAINTEXT,PROXY:PLAINTEXT,CONTROLLER:PLAINTEXT"),
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

# A broker tells its clients where to find it, and the ports are known only once the containers have been started.
WAIT_FOR_ADDRESSES_THEN_RUN = f"""
until [ -s {ADDRESSES_FILE} ]; do sleep 0.1; done
export KAFKA_ADVERTISED_LISTENERS="BROKER://localhost:19092,$(cat {ADDRESSES_FILE})"
exec /etc/kafka/docker/run
"""

# Its parts find each other on the loopback address; only S3 is reached from outside. See docker-compose.yml.
S3_COMMAND = (
    f"-logtostderr=true mini -dir=/data -ip=127.0.0.1 -ip.bind=0.0.0.0 -s3.port={S3_PORT} "
    "-webdav=false -admin.ui=false -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false "
    "-s3.iam.readOnly=false"  # tests make users with fewer rights
)
S3_KEYS = {"AWS_ACCESS_KEY_ID": "tripfold-tests", "AWS_SECRET_ACCESS_KEY": "only-for-tests-in-containers"}
S3_REGION = "us-east-1"


class Containers(msgspec.Struct, frozen=True, kw_only=True):
    """Where what runs in containers is found: Kafka and the store, both once more through the proxy, and the proxy."""

    kafka: str
    s3_url: str
    toxiproxy_url: str
    proxied_kafka: str
    proxied_s3_url: str

    def environment(self) -> dict[str, str]:
        """Return the variables by which the tests find all of it."""
        return {
            **S3_KEYS,
            KAFKA_VARIABLE: self.kafka,
            S3_VARIABLE: self.s3_url,
            TOXIPROXY_VARIABLE: self.toxiproxy_url,
            PROXIED_KAFKA_VARIABLE: self.proxied_kafka,
            PROXIED_S3_VARIABLE: self.proxied_s3_url,
        }


def compose_image(variable: str) -> str:
    """Return the image that a variable names, or else the one that docker-compose.yml runs in its place."""
    pinned = re.search(rf"\$\{{{variable}:-([^}}]+)\}}", COMPOSE_FILE.read_text(encoding="utf-8"))
    assert pinned is not None, f"{COMPOSE_FILE} names no image by {variable}"
    return os.environ.get(variable, pinned[1])


@contextmanager
def containers() -> Iterator[Containers]:
    """Run all three while the block lasts.

    Raises DockerException if there is no Docker engine or an image is missing, and TimeoutError, with the container's
    log, for one that is not ready in time.
    """
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        proxy = stack.enter_context(_proxy(network))
        s3 = stack.enter_context(_s3(network))
        kafka = stack.enter_context(_kafka(network))
        addresses = f"HOST://{_address(kafka, KAFKA_PORT)},PROXY://{_address(proxy, PROXIED_KAFKA_PORT)}"
        kafka.copy_into_container(addresses.encode(), ADDRESSES_FILE)
        # The store answers anybody on its health page once it is ready.
        HttpWaitStrategy(S3_PORT, "/healthz").with_startup_timeout(START_DEADLINE_S).wait_until_ready(s3)
        HttpWaitStrategy(PROXY_API_PORT, "/version").with_startup_timeout(START_DEADLINE_S).wait_until_ready(proxy)
        LogMessageWaitStrategy("Kafka Server started").with_startup_timeout(START_DEADLINE_S).wait_until_ready(kafka)
        found = Containers(
            kafka=_address(kafka, KAFKA_PORT),
            s3_url=f"http://{_address(s3, S3_PORT)}",
            toxiproxy_url=f"http://{_address(proxy, PROXY_API_PORT)}",
            proxied_kafka=_address(proxy, PROXIED_KAFKA_PORT),
            proxied_s3_url=f"http://{_address(proxy, PROXIED_S3_PORT)}",
        )
        toxiproxy = stack.enter_context(Toxiproxy(found.toxiproxy_url))
        toxiproxy.make("kafka", listen=f"0.0.0.0:{PROXIED_KAFKA_PORT}", upstream=f"kafka:{KAFKA_PORT_BEHIND_PROXY}")
        toxiproxy.make("s3", listen=f"0.0.0.0:{PROXIED_S3_PORT}", upstream=f"s3:{S3_PORT}")
        yield found


def _proxy(network: Network) -> DockerContainer:
    image = os.environ.get("TRIPFOLD_PROXY_IMAGE", PROXY_IMAGE)
    ports = (PROXY_API_PORT, PROXIED_KAFKA_PORT, PROXIED_S3_PORT)
    return DockerContainer(image).with_network(network).with_exposed_ports(*ports)


def _s3(network: Network) -> DockerContainer:
    container = DockerContainer(compose_image("TRIPFOLD_S3_IMAGE")).with_network(network).with_network_aliases("s3")
    return container.with_exposed_ports(S3_PORT).with_envs(**S3_KEYS).with_command(S3_COMMAND)


def _kafka(network: Network) -> DockerContainer:
    image = compose_image("TRIPFOLD_KAFKA_IMAGE")
    container = DockerContainer(image).with_network(network).with_network_aliases("kafka")
    command = ["bash", "-c", WAIT_FOR_ADDRESSES_THEN_RUN]
    return container.with_exposed_ports(KAFKA_PORT).with_envs(**KAFKA_SETTINGS).with_command(command)


def _address(container: DockerContainer, port: int) -> str:
    return f"{container.get_container_host_ip()}:{container.get_exposed_port(port)}"


def main(arguments: list[str]) -> int:
    """Run tests/integration, tests/network, and whatever else ``arguments`` say to pytest; return its exit code."""
    try:
        with containers() as found:
            os.environ.update(found.environment())
            # The bucket of the embedded store, which tests take for one that is there.
            boto3.client("s3", endpoint_url=found.s3_url, region_name=S3_REGION).create_bucket(Bucket=BUCKET)
            return int(pytest.main(["tests/integration", "tests/network", *arguments]))
    except DockerException as error:
        sys.stderr.write(f"tests.containers: what the tests need could not be run in Docker: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
