"""Creates the topics of ``shared.domain.topics`` on a cluster, and compares the cluster with that table."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple

import msgspec
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from shared.domain.topics import TOPICS, TopicSpec, min_insync_replicas
from shared.kafka.connection import connection
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings

LISTED_DEADLINE_S = 10.0
LISTED_INTERVAL_S = 0.05

MISSING = "missing"
MIN_INSYNC = "min.insync.replicas"
REPLICATION = "replication factor"
REPLICAS_DEFAULT = 3


class TopicDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A topic, or a setting of it, that differs from the table."""

    topic: str
    what: str
    found: str
    expected: str


@contextlib.asynccontextmanager
async def admin_client(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    """Connect an admin client to the cluster. Raises DependencyUnavailable if it cannot be reached."""
    client = AIOKafkaAdminClient(**connection(settings), request_timeout_ms=20_000)
    try:
        try:
            await client.start()
        except (KafkaError, OSError) as error:
            raise DependencyUnavailable(
                f"Kafka at {settings.kafka_bootstrap_servers} cannot be reached: {error}"
            ) from error
        yield client
    finally:
        await client.close()


class TopicSize(NamedTuple):
    """The size of a topic."""

    partitions: int
    replicas: int


async def apply_topics(settings: Settings) -> dict[str, TopicSize]:
    """Create the missing topics and return their sizes by name. Existing topics are not changed."""
    async with admin_client(settings) as client:
        present = await _sizes(client, settings)
        brokers = len((await client.describe_cluster())["brokers"])
        size = size_of_new_topics(settings, present.values(), brokers=brokers)
        created: dict[str, TopicSize] = {}
        for spec in TOPICS:
            name = spec.name(settings.topic_prefix)
            if name in present:
                continue
            new = NewTopic(
                name=name,
                num_partitions=size.partitions,
                replication_factor=size.replicas,
                topic_configs={**spec.config, MIN_INSYNC: str(min_insync_replicas(size.replicas))},
            )
            response = await client.create_topics([new])
            for _, code, *message in response.topic_errors:
                error = for_code(code)
                if code and error is not TopicAlreadyExistsError:
                    raise DependencyUnavailable(f"topic {name} could not be created: {error.__name__} {message}")
                if not code:
                    created[name] = size
        await _until_listed(client, list(created))
        return created


def size_of_new_topics(settings: Settings, present: Iterable[TopicSize], *, brokers: int) -> TopicSize:
    """Return the size of the topics to create: that of the settings.

    A size that they leave to the default is at least that of the largest topic that is ``present``. The default number
    of replicas is REPLICAS_DEFAULT, or the number of ``brokers`` if there are fewer.
    """
    partitions, replicas = settings.kafka_partitions, settings.kafka_replication_factor
    if "kafka_partitions" not in settings.model_fields_set:
        partitions = max([partitions, *(size.partitions for size in present)])
    if replicas is None:
        replicas = max([min(REPLICAS_DEFAULT, brokers), *(size.replicas for size in present)])
    return TopicSize(partitions, replicas)


async def _sizes(client: AIOKafkaAdminClient, settings: Settings) -> dict[str, TopicSize]:
    """Return the sizes of the topics of the table that exist, by name."""
    names = {spec.name(settings.topic_prefix) for spec in TOPICS}
    return {
        topic["topic"]: TopicSize(len(topic["partitions"]), min(len(one["replicas"]) for one in topic["partitions"]))
        for topic in await client.describe_topics()
        if topic["topic"] in names
    }


async def _until_listed(client: AIOKafkaAdminClient, names: Sequence[str]) -> None:
    """Wait until the cluster lists the created topics, so that the next command finds them."""
    deadline_s = time.monotonic() + LISTED_DEADLINE_S
    while missing := set(names) - set(await client.list_topics()):
        if time.monotonic() > deadline_s:
            raise DependencyUnavailable(
                f"topics {', '.join(sorted(missing))} were created, but the cluster does not list them yet"
            )
        await asyncio.sleep(LISTED_INTERVAL_S)


async def check_topics(settings: Settings) -> list[TopicDifference]:
    """Return where the topics on the cluster differ from the table."""
    differences = []
    async with admin_client(settings) as client:
        present = await _sizes(client, settings)
        for spec in TOPICS:
            name = spec.name(settings.topic_prefix)
            if name not in present:
                differences.append(TopicDifference(topic=name, what="topic", found=MISSING, expected="present"))
            else:
                differences += await _differences(client, name, spec, present[name], settings.kafka_replication_factor)
    return differences


def remedies(settings: Settings, differences: Sequence[TopicDifference]) -> list[str]:
    """Return the commands that fix the differences: ``tripfold topics apply``, and Kafka's for existing topics."""
    commands = []
    if any(one.found == MISSING for one in differences):
        commands.append("'tripfold topics apply' creates the missing topics")
    wanted: dict[str, list[str]] = {}
    for one in differences:
        if one.what == REPLICATION:
            commands.append(f"kafka-reassign-partitions.sh gives {one.topic} more replicas")
        elif one.found != MISSING:
            wanted.setdefault(one.topic, []).append(f"{one.what}={one.expected}")
    return commands + [
        f"kafka-configs.sh --bootstrap-server {settings.kafka_bootstrap_servers} --alter --entity-type topics "
        f"--entity-name {topic} --add-config {','.join(configs)}"
        for topic, configs in wanted.items()
    ]


async def _differences(
    client: AIOKafkaAdminClient, name: str, spec: TopicSpec, size: TopicSize, replicas: int | None
) -> list[TopicDifference]:
    responses = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
    found = {entry[0]: entry[1] for response in responses for resource in response.resources for entry in resource[4]}
    config = dict(spec.config)
    if not is_min_insync_suitable(found.get(MIN_INSYNC), size.replicas):
        config[MIN_INSYNC] = str(min_insync_replicas(size.replicas))
    differences = [
        TopicDifference(topic=name, what=setting, found=str(found.get(setting)), expected=expected)
        for setting, expected in config.items()
        if found.get(setting) != expected
    ]
    if replicas is not None and size.replicas < replicas:
        differences.append(
            TopicDifference(topic=name, what=REPLICATION, found=str(size.replicas), expected=str(replicas))
        )
    return differences


def is_min_insync_suitable(found: str | None, replicas: int) -> bool:
    """Return whether a topic's ``min.insync.replicas`` loses nothing and lets producers write.

    More than this module would set is a choice, unless the topic has fewer replicas.
    """
    return found is None or min_insync_replicas(replicas) <= int(found) <= replicas
