"""The topics on a cluster: made as the table in ``shared.domain.topics`` has them, and compared with it."""

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
LISTED_LOOK_S = 0.05


MISSING = "missing"


class TopicDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Where a topic on the cluster is not as it should be."""

    topic: str
    what: str
    found: str
    expected: str


@contextlib.asynccontextmanager
async def admin_client(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    """Connect to the cluster as an administrator. Raises DependencyUnavailable if it cannot be reached."""
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
    """Make the topics that are missing; return their names. Topics that are there are left as they are."""
    async with admin_client(settings) as client:
        present = set(await client.list_topics())
        made = []
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
            answer = await client.create_topics([new])
            for _, code, *message in answer.topic_errors:
                error = for_code(code)
                if code and error is not TopicAlreadyExistsError:
                    raise DependencyUnavailable(f"topic {name} could not be made: {error.__name__} {message}")
                if not code:
                    made.append(name)
        await _until_listed(client, made)
        return made


async def _until_listed(client: AIOKafkaAdminClient, names: Sequence[str]) -> None:
    """Wait until the cluster knows of topics that it has made: whoever comes next may ask for them."""
    deadline_s = time.monotonic() + LISTED_DEADLINE_S
    while missing := set(names) - set(await client.list_topics()):
        if time.monotonic() > deadline_s:
            raise DependencyUnavailable(f"topics {', '.join(sorted(missing))} were made, and are not listed")
        await asyncio.sleep(LISTED_LOOK_S)


async def check_topics(settings: Settings) -> list[TopicDifference]:
    """Compare the topics on the cluster with the table, and say where they differ."""
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
    """Say what mends the differences: the command that makes topics, and Kafka's own for each that is set otherwise."""
    told = ["'tripfold topics apply' makes what is missing"] if any(one.found == MISSING for one in differences) else []
    wanted: dict[str, list[str]] = {}
    for one in differences:
        if one.found != MISSING:
            wanted.setdefault(one.topic, []).append(f"{one.what}={one.expected}")
    return told + [
        f"kafka-configs.sh --bootstrap-server {settings.kafka_bootstrap_servers} --alter --entity-type topics "
        f"--entity-name {topic} --add-config {','.join(configs)}"
        for topic, configs in wanted.items()
    ]


async def _config_differences(client: AIOKafkaAdminClient, name: str, spec: TopicSpec) -> list[TopicDifference]:
    answers = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
    found = {entry[0]: entry[1] for answer in answers for resource in answer.resources for entry in resource[4]}
    return [
        TopicDifference(topic=name, what=setting, found=str(found.get(setting)), expected=expected)
        for setting, expected in spec.config.items()
        if found.get(setting) != expected
    ]
