"""The sizes of new topics, and the replicas that must acknowledge a record."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.domain.topics import min_insync_replicas
from shared.kafka.admin import TopicSize, is_min_insync_suitable, size_of_new_topics
from shared.runtime.settings import Settings

SIZES = st.lists(st.builds(TopicSize, partitions=st.integers(1, 100), replicas=st.integers(1, 5)), max_size=7)


@pytest.mark.parametrize(("replicas", "acknowledged"), [(1, 1), (2, 1), (3, 2), (5, 2)])
def test_writing_goes_on_without_one_of_several_brokers(replicas: int, acknowledged: int) -> None:
    """A topic of one replica can be written to; one of three or more keeps a record on two brokers."""
    assert min_insync_replicas(replicas) == acknowledged


@settings(max_examples=20)
@given(SIZES, st.integers(1, 9))
def test_a_default_makes_no_topic_smaller_than_the_others(present: list[TopicSize], brokers: int) -> None:
    """Without settings, a new topic has the partitions and replicas of each present topic at least."""
    size = size_of_new_topics(Settings.model_validate({}), present, brokers=brokers)
    assert size.partitions == max([12, *(one.partitions for one in present)])
    assert size.replicas == max([min(3, brokers), *(one.replicas for one in present)])


@settings(max_examples=20)
@given(SIZES, st.integers(1, 100), st.integers(1, 5))
def test_a_setting_decides_the_size(present: list[TopicSize], partitions: int, replicas: int) -> None:
    """A size in the settings holds, whatever the other topics have."""
    chosen = Settings.model_validate({"kafka_partitions": partitions, "kafka_replication_factor": replicas})
    assert size_of_new_topics(chosen, present, brokers=1) == TopicSize(partitions, replicas)


@pytest.mark.parametrize(
    ("found", "replicas", "suitable"),
    [("1", 1, True), ("2", 1, False), ("1", 3, False), ("2", 3, True), ("3", 3, True), (None, 3, True)],
)
def test_unsuitable_min_insync_replicas_are_found(found: str | None, replicas: int, *, suitable: bool) -> None:
    """Fewer than suits loses records; more than there are stops producers; a choice in between is respected."""
    assert is_min_insync_suitable(found, replicas) is suitable
