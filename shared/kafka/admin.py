"""Creates the topics of ``shared.domain.topics`` on a cluster, and compares the cluster with that table."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from shared.domain.topics import TOPICS, TopicSpec
from shared.kafka.connection import connection
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings

LISTED_DEADLINE_S = 10.0
LISTED_INTERVAL_S = 0.05

MISSING = "missing"


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


async def apply_topics(settings: Settings) -> list[str]:
    """Create the missing topics and return their names. Existing topics are not changed."""
    async with admin_client(settings) as client:
        present = set(await client.list_topics())
        created = []
        for spec in TOPICS:
            name = spec.name(settings.topic_prefix)
            if name in present:
                continue
            new = NewTopic(
                name=name,
                num_partitions=settings.kafka_partitions,
                replication_factor=settings.kafka_replication_factor,
                topic_configs=dict(spec.config),
            )
            response = await client.create_topics([new])
            for _, code, *message in response.topic_errors:
                error = for_code(code)
                if code and error is not TopicAlreadyExistsError:
                    raise DependencyUnavailable(f"topic {name} could not be created: {error.__name__} {message}")
                if not code:
                    created.append(name)
        await _until_listed(client, created)
        return created


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
        present = set(await client.list_topics())
        for spec in TOPICS:
            name = spec.name(settings.topic_prefix)
            if name not in present:
                differences.append(TopicDifference(topic=name, what="topic", found=MISSING, expected="present"))
            else:
                differences += await _config_differences(client, name, spec)
    return differences


def remedies(settings: Settings, differences: Sequence[TopicDifference]) -> list[str]:
    """Return the commands that fix the differences: ``tripfold topics apply``, and Kafka's for topic settings."""
    commands = []
    if any(one.found == MISSING for one in differences):
        commands.append("'tripfold topics apply' creates the missing topics")
    wanted: dict[str, list[str]] = {}
    for one in differences:
        if one.found != MISSING:
            wanted.setdefault(one.topic, []).append(f"{one.what}={one.expected}")
    return commands + [
        f"kafka-configs.sh --bootstrap-server {settings.kafka_bootstrap_servers} --alter --entity-type topics "
        f"--entity-name {topic} --add-config {','.join(configs)}"
        for topic, configs in wanted.items()
    ]


async def _config_differences(client: AIOKafkaAdminClient, name: str, spec: TopicSpec) -> list[TopicDifference]:
    responses = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
    found = {entry[0]: entry[1] for response in responses for resource in response.resources for entry in resource[4]}
    return [
        TopicDifference(topic=name, what=setting, found=str(found.get(setting)), expected=expected)
        for setting, expected in spec.config.items()
        if found.get(setting) != expected
    ]
