"""The services with the least rights in the bucket, on a store that enforces them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import boto3
import pytest
import pytest_asyncio
from botocore.exceptions import ClientError

from services.aggregate.tables.builder import TableBuilder
from shared.domain.ids import utc_now
from shared.domain.tables import COUNTRY_DAYS
from shared.storage.object_store import StoredObject
from tests.integration.conftest import isolated_settings
from tests.integration.running import Running, eventually, running
from tests.integration.trips import figures_of, make_trips
from tests.integration.upstream import UpstreamServer
from tripfold.local.embedded import EmbeddedServices
from tripfold.operate.iam_policies import BucketRole, policy_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVICES = (BucketRole.PLANNER, BucketRole.WORKER, BucketRole.AGGREGATE, BucketRole.API)
Keys = dict[str, str]


@pytest.fixture(scope="module")
def upstream() -> Any:
    """Serve the files of this module's cities."""
    with UpstreamServer() as server:
        yield server


def make_user(embedded: EmbeddedServices, bucket: str, role: BucketRole) -> Keys:
    """Make a user that may do what the role's policy says, and return the variables that hold its key."""
    iam = client_of(
        embedded, "iam", {"AWS_ACCESS_KEY_ID": embedded.access_key, "AWS_SECRET_ACCESS_KEY": embedded.secret_key}
    )
    name = f"{bucket}-{role}"
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    iam.put_user_policy(UserName=name, PolicyName="least", PolicyDocument=json.dumps(policy_of(role, bucket)))
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def client_of(embedded: EmbeddedServices, service: str, keys: Keys) -> Any:
    """Return a client of the store with these keys."""
    return boto3.client(
        service,
        endpoint_url=embedded.s3_endpoint_url,
        region_name=embedded.region,
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )


class Confined:
    """Tripfold whose services have a user each, and the keys of these."""

    def __init__(self, tripfold: Running, users: dict[BucketRole, Keys], embedded: EmbeddedServices) -> None:
        self.tripfold = tripfold
        self.users = users
        self.embedded = embedded

    def may(self, role: BucketRole, call: Callable[[Any], object]) -> bool:
        """Try a call with a service's key; say whether the store let it."""
        try:
            call(client_of(self.embedded, "s3", self.users[role]))
        except ClientError as error:
            return bool(error.response["ResponseMetadata"]["HTTPStatusCode"] != 403)
        return True


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def confined(
    upstream: UpstreamServer, embedded: EmbeddedServices, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Confined]:
    """Run the services, each with a user of its own."""
    intervals = {"TABLES_INTERVAL_S": "0.5", "JOBS_INTERVAL_S": "0.1"}
    settings = isolated_settings(embedded, UPSTREAM_URL=upstream.url, UPSTREAM_ATTEMPTS="2", **intervals)
    users = {role: await asyncio.to_thread(make_user, embedded, settings.s3_bucket, role) for role in SERVICES}
    own = {role.value: keys for role, keys in users.items()}
    async with running(settings, tmp_path_factory.mktemp("logs"), own=own) as services:
        yield Confined(services, users, embedded)


async def test_every_service_works_with_its_minimal_policy(confined: Confined, upstream: UpstreamServer) -> None:
    """A date, its corrected file, a move, a missing city and the ledger come out as with all rights."""
    date, tripfold = "2024-05-01", confined.tripfold
    trips = {city: make_trips(city, 50, date) for city in (1, 2)}
    for city, file in trips.items():
        upstream.add_city(city, f"City {city}", "Armenia")
        upstream.put(city, date, file)
    assert (await tripfold.process(date))["status"] == "completed"
    assert await tripfold.stats(date) == {"armenia": {date: figures_of(*trips.values())}}

    trips[1] = make_trips(7, 60, date)
    upstream.put(1, date, trips[1])
    upstream.cities[1]["country"] = "Peru"
    upstream.add_city(3, "City 3", "Peru")
    assert (await tripfold.process(date))["status"] == "completed with failures"
    assert await tripfold.stats(date) == {
        "armenia": {date: figures_of(trips[1])},
        "peru": {date: figures_of(trips[2])},
    }
    ledger = await tripfold.client.get(f"/country-stats/armenia/{date}")
    assert ledger.status_code == 200
    again = await tripfold.client.post("/process-request", params={"date": date}, headers={"Idempotency-Key": "one"})
    assert again.status_code == 202
    await tripfold.ended(again.headers["location"])


async def test_backfills_and_schedules_work_with_minimal_policies(confined: Confined, upstream: UpstreamServer) -> None:
    """A planner advances a backfill of a date that lacks data, and a schedule is made, run and deleted."""
    date, tripfold = "2024-05-03", confined.tripfold
    upstream.add_city(1, "City 1", "Armenia")
    upstream.put(1, date, make_trips(1, 50, date))
    made = await tripfold.client.post("/backfills", params={"from": date, "to": date, "only": "missing"})
    backfill = await tripfold.ended(made.headers["location"])
    assert backfill["counts"]["dates_under_way"] == backfill["counts"]["dates_skipped"] == 0
    schedule = "/schedules/daily"
    assert (await tripfold.client.put(schedule, params={"cron": "0 6 * * *"})).status_code == 200
    run = (await tripfold.client.post(f"{schedule}/run")).json()["last_run"]
    await tripfold.ended(f"/backfills/{run['backfill_id']}")
    assert (await tripfold.client.delete(schedule)).status_code == 204


async def test_the_aggregate_builds_tables_that_the_api_may_read(confined: Confined, upstream: UpstreamServer) -> None:
    """The tables of a date are current within seconds."""
    store, date = confined.tripfold.store, "2024-05-20"
    upstream.add_city(1, "City 1", "Armenia")
    upstream.put(1, date, make_trips(1, 50, date))
    await confined.tripfold.process(date)

    async def current() -> StoredObject | None:
        changed = await TableBuilder(store, clock=utc_now).changed_months(1)
        return await store.get(COUNTRY_DAYS.key("2024-05")) if not changed else None

    await eventually(current, "the tables")
    bucket = confined.tripfold.settings.s3_bucket
    key = COUNTRY_DAYS.key("2024-05")
    assert confined.may(BucketRole.API, lambda s3: s3.get_object(Bucket=bucket, Key=key))
    assert not confined.may(BucketRole.API, lambda s3: s3.put_object(Bucket=bucket, Key=key, Body=b""))


async def test_no_service_may_write_the_objects_of_another(confined: Confined) -> None:
    """The worker writes no summary, the aggregate no manifest, the API reads no raw file, and nobody deletes one."""
    bucket = confined.tripfold.settings.s3_bucket

    raw = "raw/date=2024-05-02/city=1/attempt.json"
    await confined.tripfold.store.put(raw, b"[]")
    refused: list[tuple[BucketRole, Callable[[Any], object]]] = [
        (BucketRole.WORKER, lambda s3: s3.put_object(Bucket=bucket, Key="summaries/generation=1/x.json", Body=b"")),
        (BucketRole.AGGREGATE, lambda s3: s3.put_object(Bucket=bucket, Key="manifests/x.json", Body=b"")),
        (BucketRole.PLANNER, lambda s3: s3.put_object(Bucket=bucket, Key="state/current.json", Body=b"")),
        (BucketRole.API, lambda s3: s3.get_object(Bucket=bucket, Key=raw)),
        *[(role, lambda s3: s3.delete_object(Bucket=bucket, Key=raw)) for role in SERVICES],
    ]
    assert [confined.may(role, call) for role, call in refused] == [False] * len(refused)
    assert confined.may(BucketRole.API, lambda s3: s3.list_objects_v2(Bucket=bucket))
