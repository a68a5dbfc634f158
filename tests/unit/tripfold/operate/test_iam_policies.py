"""The policies of the services in the bucket, and what the documentation says of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests import ROOT
from tripfold.operate.iam_policies import ALLOWED, BucketRole, policy_of

DOCUMENT = ROOT / "docs" / "reference" / "bucket.md"


def statements_of(role: BucketRole) -> dict[str, Any]:
    """Return a policy's statements by their names."""
    return {one["Sid"]: one for one in policy_of(role, "trips")["Statement"]}


@pytest.mark.parametrize("role", ALLOWED)
def test_no_service_may_do_everything(role: BucketRole) -> None:
    """A service's policy names actions and prefixes one by one; only listing is of the whole bucket."""
    for name, statement in statements_of(role).items():
        assert all("*" not in action for action in statement["Action"])
        if name != "List":
            assert all(resource.startswith("arn:aws:s3:::trips/") for resource in statement["Resource"])
            assert "arn:aws:s3:::trips/*" not in statement["Resource"]


def test_only_prefixes_end_in_a_star() -> None:
    """A single object is named as it is, a prefix with all that is under it."""
    write = statements_of(BucketRole.PLANNER)["Write"]
    assert write["Resource"] == [
        "arn:aws:s3:::trips/backfills/*",
        "arn:aws:s3:::trips/plans/*",
        "arn:aws:s3:::trips/requests/*",
        "arn:aws:s3:::trips/schedules/*",
        "arn:aws:s3:::trips/state/active-requests/*",
        "arn:aws:s3:::trips/state/countries.json",
        "arn:aws:s3:::trips/state/bucket-epoch.json",
        "arn:aws:s3:::trips/state/open-backfills.json",
        "arn:aws:s3:::trips/state/write-check.json",
    ]


def test_a_statement_without_resources_is_left_out() -> None:
    """A role that deletes nothing has no Delete statement: stores refuse an empty list of resources."""
    assert "Delete" not in statements_of(BucketRole.PLANNER)


def test_the_documentation_has_the_same_table() -> None:
    """The rights in docs/reference/bucket.md are those of each service's policy."""
    rows = [
        f"| {role} | {written(allowed.read)} | {written(allowed.write)} | {written(allowed.delete)} |"
        for role, allowed in ALLOWED.items()
    ]
    assert "\n".join(rows) in DOCUMENT.read_text()


def test_the_documentation_has_every_key() -> None:
    """docs/reference/bucket.md has a row for everything that a service reads or writes."""
    text = DOCUMENT.read_text()
    prefixes = {prefix for allowed in ALLOWED.values() for prefix in (*allowed.read, *allowed.write)}
    assert [prefix for prefix in prefixes if f"| `{prefix}" not in text] == []


def written(prefixes: tuple[str, ...]) -> str:
    """Write prefixes as the documentation does."""
    return ", ".join(f"`{prefix}`" for prefix in prefixes)
