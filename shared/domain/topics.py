"""The topics: names, keys, retention, consumer groups and partitioning."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

import msgspec
from aiokafka.partitioner import murmur2

DAY_MS = 24 * 60 * 60 * 1000
RECORD_BYTES_MAX = 4 * 1024 * 1024
METADATA_AGE_MAX_MS = 10_000
"""How often clients refresh topic metadata. A recreated topic is found within this time."""
DEAD_LETTER_BYTES_MAX = RECORD_BYTES_MAX + 64 * 1024
"""A dead letter is a record plus the headers for its origin and error."""


class Topic(enum.Enum):
    """A topic's name, without the prefix from the settings."""

    PROCESS_REQUESTS = "process-requests"
    CITY_TASKS = "city-tasks"
    BACKGROUND_TASKS = "background-tasks"
    RETRIES = "retries"
    CITY_STATS = "city-stats"
    COUNTRY_DAY_SUMMARIES = "country-day-summaries"
    REQUEST_PROGRESS = "request-progress"
    DEAD_LETTERS = "dead-letters"


GROUPS: Mapping[Topic, str] = {
    Topic.PROCESS_REQUESTS: "planner",
    Topic.CITY_TASKS: "worker",
    Topic.BACKGROUND_TASKS: "worker-background",
    Topic.RETRIES: "retries",
    Topic.CITY_STATS: "aggregate",
    Topic.REQUEST_PROGRESS: "progress",
}
"""The consumer group of each topic that a service consumes, without the prefix of the settings."""


def group_id(prefix: str, group: str) -> str:
    """Return a consumer group's name on the cluster."""
    return f"{prefix}tripfold-{group}"


class TopicSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The specification of a topic. ``config`` holds Kafka's topic settings under their own names."""

    topic: Topic
    key: str
    holds: str
    config: Mapping[str, str]

    def name(self, prefix: str) -> str:
        """Return the name on the cluster, with the prefix of the settings."""
        return f"{prefix}{self.topic.value}"


def _retained_for(days: int, *, bytes_max: int = RECORD_BYTES_MAX) -> dict[str, str]:
    return {
        "cleanup.policy": "delete",
        "retention.ms": str(days * DAY_MS),
        "max.message.bytes": str(bytes_max),
    }


def _compacted(**extra: str) -> dict[str, str]:
    config = {"cleanup.policy": "compact", "retention.ms": "-1", "max.message.bytes": str(RECORD_BYTES_MAX)}
    return config | {name.replace("_", "."): value for name, value in extra.items()}


TOPICS: tuple[TopicSpec, ...] = (
    TopicSpec(topic=Topic.PROCESS_REQUESTS, key="{date}", holds="ProcessRequested", config=_retained_for(30)),
    TopicSpec(topic=Topic.CITY_TASKS, key="{date}/{city_id}", holds="IngestCity", config=_retained_for(30)),
    TopicSpec(topic=Topic.BACKGROUND_TASKS, key="{date}/{city_id}", holds="IngestCity", config=_retained_for(30)),
    TopicSpec(topic=Topic.RETRIES, key="as it came", holds="IngestCity, ProcessRequested", config=_retained_for(30)),
    TopicSpec(
        topic=Topic.CITY_STATS,
        key="{date}/{country}/{city_id}",
        holds="CityDayStats, CityDayRetracted; CountryDayPlanned, keyed {date}/{country}",
        config=_compacted(min_compaction_lag_ms=str(7 * DAY_MS)),
    ),
    TopicSpec(
        topic=Topic.COUNTRY_DAY_SUMMARIES,
        key="{date}/{country}",
        holds="CountryDaySummary",
        config=_compacted(),
    ),
    TopicSpec(
        topic=Topic.REQUEST_PROGRESS,
        key="{request_id}",
        holds="RequestPlanned, CityProgressed, CityFinished, CityFolded, RequestFailed",
        config=_retained_for(30),
    ),
    TopicSpec(
        topic=Topic.DEAD_LETTERS,
        key="as it came",
        holds="what could not be processed",
        config=_retained_for(90, bytes_max=DEAD_LETTER_BYTES_MAX),
    ),
)


COMPACTED = tuple(spec.topic for spec in TOPICS if spec.config["cleanup.policy"] == "compact")
"""The topics from which Kafka removes records between others, so that their offsets have gaps."""


def min_insync_replicas(replicas: int) -> int:
    """Return the replicas of a topic that must have a record before Kafka acknowledges it.

    A topic of three replicas or more keeps its records when it loses a broker, and can be written to without that one.
    Fewer replicas cannot do both: one acknowledgement then suffices, so that writing goes on.
    """
    return 2 if replicas >= 3 else 1


def partition_of(key: bytes | None, partitions: Sequence[int], available: Sequence[int]) -> int:
    """Return the partition of a key. It depends on the first two parts, so one consumer folds a whole country-day.

    The hash is Kafka's murmur2 of those parts. A record without a key goes to the first partition; only dead letters
    can have no key.
    """
    del available  # The producer waits for an unavailable partition: another one would break the order of a key.
    if key is None:
        return partitions[0]
    return partitions[(int(murmur2(affinity_of(key))) & 0x7FFFFFFF) % len(partitions)]


def affinity_of(key: bytes) -> bytes:
    """Return the first two parts of a key, which all records of a country-day in ``city-stats`` share."""
    end = key.find(b"/", key.find(b"/") + 1)
    return key if end < 0 else key[:end]
