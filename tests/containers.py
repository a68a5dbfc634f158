"""Run the integration and network tests against containers: Apache Kafka, an S3 store, and Toxiproxy.

    python -m tests.containers [ARGUMENTS FOR PYTEST]

Kafka and the store use the images of docker-compose.yml, or TRIPFOLD_KAFKA_IMAGE and TRIPFOLD_S3_IMAGE. Toxiproxy's
image can be set by TRIPFOLD_PROXY_IMAGE. Both servers can also be reached through Toxiproxy, where tests/network
injects faults. The variables of ``Containers.environment`` tell the tests all addresses. The tests share one proxy, so
they run one after the other. All containers are removed at the end, also after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import boto3
import docker
import msgspec
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from docker.errors import DockerException, ImageNotFound
from testcontainers.core.container import DockerContainer
from testcontainers.core.labels import LABEL_SESSION_ID, SESSION_ID
from testcontainers.core.network import Network

from tests import ROOT
from tests.apache_kafka import parser_of, run_pytest
from tests.integration.conftest import KAFKA_VARIABLE, S3_VARIABLE
from tests.network.toxiproxy import (
    PROBED_KAFKA_VARIABLE,
    PROBED_S3_VARIABLE,
    PROXIED_KAFKA_VARIABLE,
    PROXIED_S3_VARIABLE,
    TOXIPROXY_CONTAINER_VARIABLE,
    TOXIPROXY_VARIABLE,
    Toxiproxy,
)
from tripfold.local.embedded import BUCKET
from tripfold.local.supervisor import http_probe

COMPOSE_FILE = ROOT / "docker-compose.yml"
PROXY_IMAGE = "ghcr.io/shopify/toxiproxy:2.12.0"
START_DEADLINE_S = 180.0  # an idle machine needs ten seconds
PROBE_INTERVAL_S = 0.2
PROBE_TIMEOUT_S = 5
LOG_LINES_MAX = 30

KAFKA_PORT = 9092
KAFKA_PORT_BEHIND_PROXY = 9094
S3_PORT = 8333
PROXY_API_PORT = 8474
PROXIED_KAFKA_PORT = 20000
PROXIED_S3_PORT = 20001
PROBED_KAFKA_PORT = 20002
PROBED_S3_PORT = 20003

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

# The broker must advertise the published ports, which are known only after the containers have started.
WAIT_FOR_ADDRESSES_THEN_RUN = f"""
until [ -s {ADDRESSES_FILE} ]; do sleep 0.1; done
export KAFKA_ADVERTISED_LISTENERS="BROKER://localhost:19092,$(cat {ADDRESSES_FILE})"
exec /etc/kafka/docker/run
"""

# SeaweedFS's parts use the loopback address; only S3 listens on all addresses. See docker-compose.yml.
S3_COMMAND = (
    f"-logtostderr=true mini -dir=/data -ip=127.0.0.1 -ip.bind=0.0.0.0 -s3.port={S3_PORT} "
    "-webdav=false -admin.ui=false -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false "
    "-s3.iam.readOnly=false"  # tests create users with fewer permissions
)
S3_KEYS = {"AWS_ACCESS_KEY_ID": "tripfold-tests", "AWS_SECRET_ACCESS_KEY": "only-for-tests-in-containers"}
S3_REGION = "us-east-1"


class NotReady(RuntimeError):
    """A container exited or did not respond in time; the message ends with its log."""


class Containers(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses of Kafka, the store and Toxiproxy, which has two proxies for each server.

    Tripfold uses the ``proxied`` addresses. The ``probed`` ones are for tests that check the proxy's faults.
    """

    kafka: str
    s3_url: str
    toxiproxy_url: str
    toxiproxy_container: str
    proxied_kafka: str
    proxied_s3_url: str
    probed_kafka: str
    probed_s3: str

    def environment(self) -> dict[str, str]:
        """Return the variables that tell the tests these addresses."""
        return {
            **S3_KEYS,
            KAFKA_VARIABLE: self.kafka,
            S3_VARIABLE: self.s3_url,
            TOXIPROXY_VARIABLE: self.toxiproxy_url,
            TOXIPROXY_CONTAINER_VARIABLE: self.toxiproxy_container,
            PROXIED_KAFKA_VARIABLE: self.proxied_kafka,
            PROXIED_S3_VARIABLE: self.proxied_s3_url,
            PROBED_KAFKA_VARIABLE: self.probed_kafka,
            PROBED_S3_VARIABLE: self.probed_s3,
        }


def compose_image(variable: str) -> str:
    """Return the image that an environment variable names, or else the default of docker-compose.yml."""
    pinned = re.search(rf"\$\{{{variable}:-([^}}]+)\}}", COMPOSE_FILE.read_text(encoding="utf-8"))
    assert pinned is not None, f"{COMPOSE_FILE} names no image by {variable}"
    return os.environ.get(variable, pinned[1])


@contextmanager
def containers() -> Iterator[Containers]:
    """Run all three containers during the block; Kafka and the store respond directly and through the proxy.

    Raises DockerException if there is no Docker engine or an image is missing, and NotReady.
    """
    with ExitStack() as stack:
        _fetch(stack.enter_context(_docker_client()))
        network = stack.enter_context(Network())
        proxy = stack.enter_context(_proxy(network))
        s3 = stack.enter_context(_s3(network))
        kafka = stack.enter_context(_kafka(network))
        toxiproxy_url = f"http://{_published(proxy, PROXY_API_PORT)}"
        _wait("Toxiproxy", proxy, lambda: asyncio.run(http_probe(f"{toxiproxy_url}/version")()))
        found = Containers(
            kafka=_published(kafka, KAFKA_PORT),
            s3_url=f"http://{_published(s3, S3_PORT)}",
            toxiproxy_url=toxiproxy_url,
            toxiproxy_container=proxy.get_container_id(),
            proxied_kafka=_own_or_published(proxy, PROXIED_KAFKA_PORT),
            proxied_s3_url=f"http://{_own_or_published(proxy, PROXIED_S3_PORT)}",
            probed_kafka=_own_or_published(proxy, PROBED_KAFKA_PORT),
            probed_s3=_own_or_published(proxy, PROBED_S3_PORT),
        )
        addresses = f"HOST://{found.kafka},PROXY://{found.proxied_kafka}"
        kafka.copy_into_container(addresses.encode(), ADDRESSES_FILE)
        with Toxiproxy(toxiproxy_url) as toxiproxy:
            for name, port in (("kafka", PROXIED_KAFKA_PORT), ("kafka-probe", PROBED_KAFKA_PORT)):
                toxiproxy.make(name, listen=f"0.0.0.0:{port}", upstream=f"kafka:{KAFKA_PORT_BEHIND_PROXY}")
            for name, port in (("s3", PROXIED_S3_PORT), ("s3-probe", PROBED_S3_PORT)):
                toxiproxy.make(name, listen=f"0.0.0.0:{port}", upstream=f"s3:{S3_PORT}")
        for address in (found.kafka, found.proxied_kafka):
            _wait(f"Kafka at {address}", kafka, partial(_kafka_responds, address))
        for url in (found.s3_url, found.proxied_s3_url):
            _wait(f"S3 at {url}", s3, partial(_s3_responds, url))
        yield found


@contextmanager
def _docker_client() -> Iterator[docker.DockerClient]:
    """Connect to Docker; remove all containers and networks of this process at the end.

    Each container's own context removes it too. But Ctrl-C can come after Docker created it and before its context
    begins.
    """
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        raise DockerException(
            f"Docker does not respond: {error}; start it, or set DOCKER_HOST to its address"
        ) from error
    try:
        yield client
    finally:
        own = {"label": f"{LABEL_SESSION_ID}={SESSION_ID}"}
        for container in client.containers.list(all=True, filters=own):
            container.remove(force=True, v=True)
        for network in client.networks.list(filters=own):
            network.remove()
        client.close()


def _fetch(client: docker.DockerClient) -> None:
    for image in (_proxy_image(), compose_image("TRIPFOLD_S3_IMAGE"), compose_image("TRIPFOLD_KAFKA_IMAGE")):
        try:
            client.images.get(image)
        except ImageNotFound:
            sys.stderr.write(f"tests.containers: pulling {image}\n")
            try:
                client.images.pull(image)
            except DockerException as error:
                raise DockerException(f"could not pull the image {image}: {error}") from error


def _wait(what: str, container: DockerContainer, responds: Callable[[], bool]) -> None:
    """Wait until a server responds. Raises NotReady."""
    ends_at_s = time.monotonic() + START_DEADLINE_S
    while not responds():
        container.reload()
        ended = container.status not in {"created", "running"}
        if ended or time.monotonic() > ends_at_s:
            log = container.get_wrapped_container().logs(tail=LOG_LINES_MAX).decode(errors="replace")
            how = "exited during startup" if ended else f"did not respond within {START_DEADLINE_S:.0f} s"
            raise NotReady(f"{what} {how}; its log ends with\n{log}")
        time.sleep(PROBE_INTERVAL_S)


def _kafka_responds(address: str) -> bool:
    """Return whether Kafka responds at an address and advertises the same address."""
    client = AdminClient({"bootstrap.servers": address, "log_level": 0})
    try:
        brokers = client.list_topics(timeout=PROBE_TIMEOUT_S).brokers.values()
    except KafkaException:
        return False
    return {f"{broker.host}:{broker.port}" for broker in brokers} == {address}


def _s3_responds(url: str) -> bool:
    """Return whether the store can create and read the bucket that tests expect.

    For some seconds after startup a store can have a bucket and return 500 for its objects.
    """
    config = Config(connect_timeout=PROBE_TIMEOUT_S, read_timeout=PROBE_TIMEOUT_S, retries={"total_max_attempts": 1})
    keys = {name.lower(): value for name, value in S3_KEYS.items()}
    client = boto3.client("s3", endpoint_url=url, region_name=S3_REGION, config=config, **keys)
    try:
        with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=BUCKET)
        client.get_object(Bucket=BUCKET, Key="none")
    except client.exceptions.NoSuchKey:
        return True
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True


def _proxy_image() -> str:
    return os.environ.get("TRIPFOLD_PROXY_IMAGE", PROXY_IMAGE)


def _proxy(network: Network) -> DockerContainer:
    container = DockerContainer(_proxy_image()).with_network(network)
    ports = (PROXY_API_PORT, PROXIED_KAFKA_PORT, PROXIED_S3_PORT, PROBED_KAFKA_PORT, PROBED_S3_PORT)
    # Tests read the broken connections from the log.
    return container.with_exposed_ports(*ports).with_envs(LOG_LEVEL="info")


def _s3(network: Network) -> DockerContainer:
    container = DockerContainer(compose_image("TRIPFOLD_S3_IMAGE")).with_network(network).with_network_aliases("s3")
    return container.with_exposed_ports(S3_PORT).with_envs(**S3_KEYS).with_command(S3_COMMAND)


def _kafka(network: Network) -> DockerContainer:
    image = compose_image("TRIPFOLD_KAFKA_IMAGE")
    container = DockerContainer(image).with_network(network).with_network_aliases("kafka")
    command = ["bash", "-c", WAIT_FOR_ADDRESSES_THEN_RUN]
    return container.with_exposed_ports(KAFKA_PORT).with_envs(**KAFKA_SETTINGS).with_command(command)


def _published(container: DockerContainer, port: int) -> str:
    host = container.get_container_host_ip()
    # localhost can resolve to ::1 first, where another program may use the port.
    return f"{'127.0.0.1' if host == 'localhost' else host}:{container.get_exposed_port(port)}"


def _own_or_published(proxy: DockerContainer, port: int) -> str:
    """Return the container's own address if this machine can reach it (Docker on Linux), or the published one.

    Docker's own proxy serves a published port. It accepts connections for a closed port and turns a reset into a close,
    so it hides some faults from the tests.
    """
    host = proxy.get_docker_client().bridge_ip(proxy.get_container_id())
    try:
        socket.create_connection((host, PROXY_API_PORT), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return _published(proxy, port)
    return f"{host}:{port}"


def main(arguments: list[str]) -> int:
    """Run tests/integration and tests/network, with more ``arguments`` for pytest; return its exit code."""
    _, arguments = parser_of("tests.containers", __doc__).parse_known_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with containers() as found:
            return run_pytest("tests/integration", "tests/network", *arguments, "-n0", **found.environment())
    except (DockerException, NotReady) as error:
        sys.stderr.write(f"tests.containers: the containers did not start: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
