"""Fixtures of integration tests: a real S3 and a real Kafka, started once for each test process.

Kafka is the embedded broker, or the one at TRIPFOLD_TEST_KAFKA_BOOTSTRAP_SERVERS. S3 is the embedded SeaweedFS, or the
store at TRIPFOLD_TEST_S3_ENDPOINT_URL, whose keys are in the AWS variables. Every test has topics and a bucket of its
own, by a prefix.
"""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterator

import botocore.loaders
import botocore.session
import msgspec
import pytest

from shared.runtime.settings import Settings, load_settings
from tripfold.local.embedded import EmbeddedServices, embedded_services

KAFKA_VARIABLE = "TRIPFOLD_TEST_KAFKA_BOOTSTRAP_SERVERS"
S3_VARIABLE = "TRIPFOLD_TEST_S3_ENDPOINT_URL"

# Without one loader for all, each client of botocore parses the models of S3 again.
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServices]:
    """SeaweedFS and the embedded broker, on a data directory of this test process; or the store that is told of."""
    with embedded_services(tmp_path_factory.mktemp("embedded")) as services:
        if S3_VARIABLE in os.environ:
            yield msgspec.structs.replace(
                services,
                s3_endpoint_url=os.environ[S3_VARIABLE],
                access_key=os.environ["AWS_ACCESS_KEY_ID"],
                secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            )
            return
        patch = pytest.MonkeyPatch()
        patch.setenv("AWS_ACCESS_KEY_ID", services.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", services.secret_key)
        yield services
        patch.undo()


@pytest.fixture
def settings(embedded: EmbeddedServices) -> Settings:
    """Return settings with topics and a bucket that no other test uses."""
    return isolated_settings(embedded)


def isolated_settings(embedded: EmbeddedServices, **changes: str) -> Settings:
    """Return settings for the test services with a new prefix and bucket; ``changes`` are variables without prefix."""
    name = f"t{uuid.uuid4().hex[:12]}"
    environment = {
        **embedded.environment(),
        "TRIPFOLD_S3_BUCKET": name,
        "TRIPFOLD_TOPIC_PREFIX": f"{name}.",
        "TRIPFOLD_KAFKA_PARTITIONS": "3",
        "TRIPFOLD_KAFKA_GROUP_INSTANCE_ID": "test",
        "TRIPFOLD_KAFKA_SESSION_TIMEOUT_S": "6",
        "TRIPFOLD_PROGRESS_INTERVAL_S": "0.1",
        **{f"TRIPFOLD_{key}": value for key, value in changes.items()},
    }
    if KAFKA_VARIABLE in os.environ:
        environment["TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS"] = os.environ[KAFKA_VARIABLE]
    return load_settings(environment)
