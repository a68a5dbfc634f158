"""The minimal IAM policy of each service in the bucket.

Every service may list the bucket. Without that right S3 responds with 403 to a read of a missing object, and the
services rely on 404. Keys hold only dates, city ids and country slugs. Every service may write the object with which it
checks the bucket. No service may delete, except the worker, which deletes its own notes on attempts; an operator
deletes the rest.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import msgspec

from shared.domain import keys


class BucketRole(StrEnum):
    """A user of the bucket."""

    API = "api"
    PLANNER = "planner"
    WORKER = "worker"
    AGGREGATE = "aggregate"
    OPERATOR = "operator"


class BucketRights(msgspec.Struct, frozen=True, kw_only=True):
    """The prefixes that a role may read, write and delete under."""

    read: tuple[str, ...]
    write: tuple[str, ...]
    delete: tuple[str, ...] = ()
    multipart: tuple[str, ...] = ()


ALLOWED: Final = {
    BucketRole.API: BucketRights(
        read=(
            "backfills/",
            "idempotency/",
            "lake/",
            "manifests/",
            "plans/",
            "quarantine/",
            "requests/",
            "schedules/",
            "state/",
            "summaries/",
        ),
        write=(
            "backfills/",
            "idempotency/",
            "requests/",
            "schedules/",
            "state/active-requests/",
            "state/open-backfills.json",
        ),
        delete=("schedules/",),
    ),
    BucketRole.PLANNER: BucketRights(
        read=("backfills/", "manifests/", "plans/", "requests/", "schedules/", "state/"),
        write=(
            "backfills/",
            "plans/",
            "requests/",
            "schedules/",
            "state/active-requests/",
            "state/countries.json",
            "state/bucket-epoch.json",
            "state/open-backfills.json",
        ),
    ),
    BucketRole.WORKER: BucketRights(
        read=("attempts/", "manifests/", "plans/", "quarantine/", "raw/", "requests/", "state/"),
        write=("attempts/", "manifests/", "quarantine/", "raw/", "state/bucket-epoch.json"),
        delete=("attempts/",),
        multipart=("raw/",),
    ),
    BucketRole.AGGREGATE: BucketRights(
        read=("lake/", "manifests/", "plans/", "requests/", "state/", "summaries/"),
        write=("lake/", "requests/", "state/changes/", "summaries/"),
    ),
}


def policy_of(role: BucketRole, bucket: str) -> dict[str, Any]:
    """Return the policy that a role needs on ``bucket``, as an AWS IAM document of version 2012-10-17."""
    arn = f"arn:aws:s3:::{bucket}"
    if role is BucketRole.OPERATOR:
        return _document(_statement("EverythingInTheBucket", ["s3:*"], [arn, f"{arn}/*"]))
    allowed = ALLOWED[role]
    statements = [
        _statement("List", ["s3:ListBucket"], [arn]),
        _statement("Read", ["s3:GetObject"], _arns(arn, allowed.read)),
        _statement("Write", ["s3:PutObject"], _arns(arn, (*allowed.write, keys.WRITE_CHECK))),
        _statement("Delete", ["s3:DeleteObject"], _arns(arn, allowed.delete)),
        _statement("AbortUploads", ["s3:AbortMultipartUpload"], _arns(arn, allowed.multipart)),
    ]
    return _document(*(statement for statement in statements if statement["Resource"]))


def _arns(arn: str, prefixes: tuple[str, ...]) -> list[str]:
    return [f"{arn}/{prefix}*" if prefix.endswith("/") else f"{arn}/{prefix}" for prefix in prefixes]


def _statement(name: str, actions: list[str], resources: list[str]) -> dict[str, Any]:
    return {"Sid": name, "Effect": "Allow", "Action": actions, "Resource": resources}


def _document(*statements: dict[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}
