"""Accepting, reading, listing, cancelling and retrying requests."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterable

import msgspec
import pytest
from msgspec import UNSET
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from services.api.auth import digest_of, mint_key
from services.api.http.errors import StatusNotWritten
from services.api.requests import service as requests_module
from shared.domain import keys, objects
from shared.domain.events import BACKGROUND, BadCity, Outcome, ProcessRequested, Retry
from shared.domain.ids import CityId, RequestId, parse_request_id
from shared.domain.objects import CityUnderWay, Failure, RequestRecord
from shared.domain.requests import ACTIONS_MAX, Caller, caller_of_backfill, with_action
from shared.domain.topics import Topic
from shared.kafka.records import OutgoingEvent
from shared.storage import active_requests
from shared.storage.object_store import CasConflict, StoreUnavailable
from tests.fakes.api import DAY, NOW, REQUEST, Client, ObservedPublisher, ObservedStore, World, record_of, write
from tests.fakes.builders import Clock


def test_an_accepted_request_is_published_and_recorded(world: World, client: Client) -> None:
    """An accepted date is published, its record is in the bucket, and Location leads to the same representation."""
    response = client.post("/process-request?date=2024-05-01")
    assert response.status_code == 202
    body = response.json()
    assert response.headers["location"] == f"/process-requests/{body['id']}"
    assert (body["date"], body["status"], body["version"]) == ("2024-05-01", "accepted", 1)
    assert body["requested_at"] == body["updated_at"] == "2024-06-01T12:30:00Z"
    assert parse_request_id(body["id"]) is not None
    assert client.get(response.headers["location"]).json() == body
    assert world.published(Topic.PROCESS_REQUESTS) == [
        ProcessRequested(request_id=body["id"], date=DAY, requested_at=NOW)
    ]


def test_the_log_names_each_request_and_the_http_request_that_caused_it(client: Client) -> None:
    """A client's X-Request-ID leads to the id of the request, also if it joined the request of another client."""
    with capture_logs(processors=[merge_contextvars]) as logged:
        for http_request_id in ("first", "second"):
            response = client.post("/process-request?date=2024-05-01", headers={"X-Request-ID": http_request_id})
        client.delete(response.headers["location"], headers={"X-Request-ID": "third"})
    assert [(line["event"], line["http_request_id"]) for line in logged if response.json()["id"] in str(line)] == [
        ("request_accepted", "first"),
        ("http_request", "first"),
        ("http_request", "second"),
        ("http_request", "third"),
    ]


def test_a_request_records_who_asked_for_it_joined_cancelled_and_retried_it(world: World) -> None:
    """The record has each action once with the key, the address, the parameters, the result and the time."""
    nightly, page = mint_key(), mint_key()
    keys_named = ",".join(f"{name}:process:{digest_of(key)}" for name, key in (("nightly", nightly), ("page", page)))
    with world.client(api_access="keys", api_keys=keys_named) as client:
        for key in (nightly, page, page):
            path = client.post("/process-request?date=2024-05-01", headers={"X-API-Key": key}).headers["location"]
        world.clock.advance(60)
        client.delete(path, headers={"X-API-Key": page})
        client.delete(path, headers={"X-API-Key": nightly})
    actions = read_record(world, path).actions
    assert [(one.action, one.key, one.client, one.parameters, one.result) for one in actions] == [
        ("process", "nightly", "testclient", "date=2024-05-01", "accepted"),
        ("process", "page", "testclient", "date=2024-05-01", "joined"),
        ("cancel", "page", "testclient", "", "cancelled"),
    ]
    assert [one.at - NOW for one in actions] == [dt.timedelta(seconds=s) for s in (0, 0, 60)]


def test_a_request_names_the_backfill_that_made_it(world: World, client: Client) -> None:
    """A request of a backfill names it, until a client joins the request."""
    by = caller_of_backfill(REQUEST)
    made = with_action(record_of(NOW), by, "process", result="accepted", at=NOW)
    write(world, with_action(made, Caller(client="10.0.0.1"), "cancel", result="cancelled", at=NOW))
    path = f"/process-requests/{made.request_id}"
    assert client.get(path).json()["backfill_id"] == REQUEST
    write(world, with_action(made, Caller(client="10.0.0.1"), "process", result="joined", at=NOW))
    assert client.get(path).json()["backfill_id"] is None
    assert client.get("/process-requests").json()["requests"][0]["backfill_id"] is None


def test_date_out_of_bounds_is_refused(world: World, client: Client) -> None:
    """A date before 2000 or more than 366 days ahead is refused with the dates that are accepted."""
    for date in ("1999-12-31", "9999-12-31", "2025-06-03"):
        response = client.post(f"/process-request?date={date}")
        (fault,) = response.json()["invalid_parameters"]
        assert (response.status_code, fault["name"]) == (400, "date")
        assert "is not between 2000-01-01 and 2025-06-02" in fault["reason"]
    assert world.published(Topic.PROCESS_REQUESTS) == []
    assert client.post("/process-request?date=2025-06-02").status_code == 202


def test_a_retry_is_recorded_with_its_client(world: World, client: Client) -> None:
    """The record says who retried how many cities."""
    failed = msgspec.structs.replace(
        record_of(), planned=True, plan_revision=3, cities=2, outcomes={Outcome.FAILED: "3"}
    )
    write(world, failed)
    path = f"/process-requests/{failed.request_id}"
    assert client.post(f"{path}/retry").status_code == 202
    assert client.post(f"{path}/retry").status_code == 202
    (action,) = read_record(world, path).actions
    assert (action.action, action.client, action.result) == ("retry", "testclient", "2 cities")


async def test_a_client_that_joins_brings_a_request_to_the_foreground(world: World) -> None:
    """A request of a backfill that a client has joined is processed like the requests of clients."""
    record = msgspec.structs.replace(record_of(), background=BACKGROUND)
    write(world, record)
    await active_requests.join(world.store, record.date, record.request_id)
    requests = requests_module.Requests(world.store, world.publisher, clock=world.clock)
    joined = await requests.accept(record.date, by=Caller(client="page"))
    assert (joined.request_id, joined.background) == (record.request_id, UNSET)


async def test_a_record_keeps_a_bounded_number_of_actions(world: World) -> None:
    """Clients that join a request with the most actions are not recorded; a cancellation replaces the second action."""
    requests = requests_module.Requests(world.store, world.publisher, clock=world.clock)
    for number in range(ACTIONS_MAX + 5):
        record = await requests.accept(DAY, by=Caller(client=str(number)))
    assert [one.client for one in record.actions] == [str(number) for number in range(ACTIONS_MAX)]
    cancelled = await requests.cancel(record.request_id, by=Caller(client="last"))
    assert [one.client for one in cancelled.actions] == ["0", *map(str, range(2, ACTIONS_MAX)), "last"]


def read_record(world: World, path: str) -> RequestRecord:
    """Return the record of the request at a path."""
    key = keys.request(RequestId(path.rpartition("/")[2]))
    return objects.decode(RequestRecord, world.store.objects[key].body, key)


async def test_simultaneous_requests_of_a_date_are_one(world: World) -> None:
    """Twenty concurrent requests of a date become one request, which is published once."""
    requests = requests_module.Requests(world.store, world.publisher, clock=world.clock)
    records = await asyncio.gather(*(requests.accept(DAY) for _ in range(20)))
    assert len({record.request_id for record in records}) == 1
    assert len(world.published(Topic.PROCESS_REQUESTS)) == 1


@pytest.mark.parametrize(
    "changes",
    [{"planned": True}, {"cancelled_at": NOW}, {"failed_reason": "the list of cities could not be had"}],
    ids=["it was begun", "it was cancelled", "it has failed"],
)
def test_a_request_that_reads_nothing_more_is_not_joined(
    world: World, client: Client, changes: dict[str, object]
) -> None:
    """A client whose date has a waiting request that will not read the files after all gets one of its own."""
    first = client.post("/process-request?date=2024-05-01").json()["id"]
    record = msgspec.structs.replace(record_of(), request_id=RequestId(first), **changes)
    write(world, record)
    assert client.post("/process-request?date=2024-05-01").json()["id"] != first


async def test_a_started_request_is_not_joined(world: World, client: Client) -> None:
    """A client that requests a date while its files are being read gets another request."""
    first = client.post("/process-request?date=2024-05-01").json()["id"]
    assert await active_requests.begin(world.store, DAY, RequestId(first), NOW)
    assert client.post("/process-request?date=2024-05-01").json()["id"] != first


@pytest.mark.parametrize("query", ["", "date=", "date=tomorrow", "date=2024-05-01&date=2024-05-02", "day=2024-05-01"])
def test_invalid_date_is_400(world: World, client: Client, query: str) -> None:
    """A missing or invalid date is 400, and nothing is published."""
    response = client.post(f"/process-request?{query}")
    assert (response.status_code, response.headers["content-type"]) == (400, "application/problem+json")
    assert {"date", "day"} & {fault["name"] for fault in response.json()["invalid_parameters"]}
    assert world.published(Topic.PROCESS_REQUESTS) == []
    assert world.store.bodies(keys.REQUESTS) == {}


def test_outage_of_kafka_is_503_with_retry_after(world: World, client: Client) -> None:
    """While Kafka does not acknowledge, the response is 503 with Retry-After, and no record is written."""
    world.publisher.down = True
    response = client.post("/process-request?date=2024-05-01")
    assert (response.status_code, response.headers["content-type"]) == (503, "application/problem+json")
    assert int(response.headers["retry-after"]) > 0
    assert "Kafka" in response.json()["detail"]
    assert "internal" not in response.text
    assert world.store.bodies(keys.REQUESTS) == {}


def test_wait_for_kafka_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API waits a limited time for an acknowledgement of Kafka."""

    class Silent(ObservedPublisher):
        async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
            del outgoing
            await asyncio.Event().wait()

    monkeypatch.setattr(requests_module, "ACKNOWLEDGE_DEADLINE_S", 0.01)
    world = World()
    world.publisher = Silent(world.log)
    with world.client() as client:
        response = client.post("/process-request?date=2024-05-01")
    assert response.status_code == 503
    assert "Kafka" in response.json()["detail"]


def test_outage_of_s3_when_accepting_is_503_and_publishes_nothing(world: World, client: Client) -> None:
    """While S3 is down the response is 503 with Retry-After, and nothing is published."""
    world.store.down = True
    response = client.post("/process-request?date=2024-05-01")
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    assert world.published(Topic.PROCESS_REQUESTS) == []


def test_outage_of_s3_after_publishing_is_503_with_the_request_id() -> None:
    """When the record cannot be written the response is 503, and names the request, which was published."""

    class Last(ObservedPublisher):
        async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
            await super().publish(outgoing)
            world.store.down = True

    world = World()
    world.publisher = Last(world.log)
    with world.client() as client:
        response = client.post("/process-request?date=2024-05-01")
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    (published,) = world.published(Topic.PROCESS_REQUESTS)
    assert isinstance(published, ProcessRequested)
    assert response.json()["request_id"] == published.request_id


def test_the_record_is_written_after_kafka_acknowledged() -> None:
    """The API writes the record only after Kafka has acknowledged the event."""

    class Ordered(ObservedPublisher):
        async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
            assert world.store.bodies(keys.REQUESTS) == {}
            await super().publish(outgoing)

    world = World()
    world.publisher = Ordered(world.log)
    with world.client() as client:
        assert client.post("/process-request?date=2024-05-01").status_code == 202
    assert len(world.store.bodies(keys.REQUESTS)) == 1


def test_record_written_by_progress_first_is_kept() -> None:
    """If the progress service writes the record first, that record stays and is the response."""

    class Faster(ObservedPublisher):
        async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
            for item in outgoing:
                event = item.event
                assert isinstance(event, ProcessRequested)
                record = msgspec.structs.replace(
                    record_of(), request_id=event.request_id, version=2, planned=True, cities=4
                )
                write(world, record)

    world = World()
    world.publisher = Faster(world.log)
    with world.client() as client:
        body = client.post("/process-request?date=2024-05-01").json()
        assert (body["status"], body["version"], body["counts"]["cities_total"]) == ("planned", 2, 4)
        assert client.get(f"/process-requests/{body['id']}").json() == body


def test_status_has_counts_and_failures(world: World, client: Client) -> None:
    """The status of a request has its counts, totals and failures."""
    record = msgspec.structs.replace(
        record_of(),
        version=7,
        planned=True,
        plan_revision=3,
        cities=5,
        countries=2,
        outcomes={Outcome.FAILED: "1", Outcome.UNCHANGED: "2", Outcome.STORED: "4"},
        served="2",
        under_way={2: CityUnderWay(bytes_done=50, bytes_total=60, trips_done=6), 3: CityUnderWay(bytes_done=10)},
        bytes_done=100,
        trips_done=9,
        failures={
            0: Failure(
                city_id=CityId("7"),
                city_name="Port Tina",
                reason="the upstream answered 404",
                quarantine_key="quarantine/date=2024-05-01/city=7/a.json",
            )
        },
        bad_cities_count=1,
        bad_cities=(BadCity(entry="{}", reason="its id is None"),),
    )
    write(world, record)
    assert client.get(f"/process-requests/{record.request_id}").json() == {
        "id": record.request_id,
        "date": "2024-05-01",
        "status": "running",
        "requested_at": "2024-06-01T12:30:00Z",
        "updated_at": "2024-06-01T12:30:00Z",
        "version": 7,
        "countries": 2,
        "counts": {
            "cities_total": 5,
            "cities_done": 2,
            "cities_failed": 1,
            "cities_skipped": 0,
            "cities_unchanged": 1,
            "cities_stored": 1,
            "bytes_done": 160,
            "bytes_total": 170,
            "trips_done": 15,
        },
        "failed_reason": None,
        "cancelled_at": None,
        "backfill_id": None,
        "failures": [
            {
                "city_id": "7",
                "city_name": "Port Tina",
                "reason": "the upstream answered 404",
                "quarantine_key": "quarantine/date=2024-05-01/city=7/a.json",
            }
        ],
        "bad_cities_count": 1,
        "bad_cities": [{"entry": "{}", "reason": "its id is None"}],
        "retry": None,
    }


def test_failed_request_has_its_reason(world: World, client: Client) -> None:
    """A request that failed as a whole has a reason."""
    record = msgspec.structs.replace(record_of(), failed_reason="the list of cities could not be had")
    write(world, record)
    body = client.get(f"/process-requests/{record.request_id}").json()
    assert (body["status"], body["failed_reason"]) == ("failed", "the list of cities could not be had")


@pytest.mark.parametrize("text", [REQUEST, REQUEST.upper(), "1", "..%2f..%2fstate%2fcurrent", "%00", "a" * 3000])
def test_unknown_request_is_404(client: Client, text: str) -> None:
    """An unknown or malformed id is 404, as a problem."""
    response = client.get(f"/process-requests/{text}")
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
    assert len(response.text) < 1_000


def test_requests_are_listed_latest_first(world: World, client: Client) -> None:
    """Requests are listed latest first, up to the limit, without their failures."""
    records = [record_of(NOW + dt.timedelta(milliseconds=place)) for place in range(60)]
    for record in records:
        write(world, record)
    latest = [record.request_id for record in reversed(records)]
    listed = client.get("/process-requests").json()["requests"]
    assert [request["id"] for request in listed] == latest[:50]
    assert "failures" not in listed[0]
    assert [request["id"] for request in client.get("/process-requests?limit=2").json()["requests"]] == latest[:2]
    assert len(client.get("/process-requests?limit=500").json()["requests"]) == 60


def test_list_of_an_empty_bucket_is_empty(client: Client) -> None:
    """A bucket without requests lists none."""
    assert client.get("/process-requests").json() == {"requests": [], "unreadable": [], "next": None}


def test_unreadable_records_are_named(world: World, client: Client) -> None:
    """The list names an unreadable record and leaves it out; a query for it alone is a problem with key and remedy."""
    broken, newer, good = (record_of(NOW + dt.timedelta(seconds=place)) for place in range(3))
    for record in (broken, newer, good):
        write(world, record)
    key = keys.request(broken.request_id)
    world.store.write(key, b'{"schema_version":1,"request_id"')
    world.store.write(keys.request(newer.request_id), b'{"schema_version":99}')
    response = client.get("/process-requests?limit=2")
    assert [one["id"] for one in response.json()["requests"]] == [good.request_id]
    assert [one["key"] for one in response.json()["unreadable"]] == [keys.request(newer.request_id)]
    assert "upgrade" in response.json()["unreadable"][0]["reason"]
    assert response.headers["tripfold-unreadable"] == keys.request(newer.request_id)
    rest = client.get(response.json()["next"])
    assert ([one["key"] for one in rest.json()["unreadable"]], rest.json()["next"]) == ([key], None)
    alone = client.get(f"/process-requests/{broken.request_id}")
    assert (alone.status_code, alone.json()["type"]) == (500, "urn:problem-type:tripfold:unreadable-object")
    assert key in alone.json()["detail"]
    assert "Request its date again" in alone.json()["detail"]


def test_next_links_list_every_request_once(world: World, client: Client) -> None:
    """Following ``next`` lists every request once, latest first, without those that arrive meanwhile."""
    records = [record_of(NOW + dt.timedelta(milliseconds=place)) for place in range(5)]
    for record in records:
        write(world, record)
    listed, where = [], "/process-requests?limit=2"
    while where:
        body = client.get(where).json()
        listed += [request["id"] for request in body["requests"]]
        where = body["next"]
        write(world, record_of(NOW + dt.timedelta(seconds=len(listed))))
    assert listed == [record.request_id for record in reversed(records)]


@pytest.mark.parametrize("after", ["1", REQUEST.upper(), f"{REQUEST}0"])
def test_invalid_page_start_is_refused(client: Client, after: str) -> None:
    """A page begins after a request id; any other value is refused."""
    response = client.get(f"/process-requests?after={after}")
    assert (response.status_code, response.json()["invalid_parameters"][0]["name"]) == (400, "after")


def test_cancelling_is_idempotent_and_keeps_the_status(world: World, client: Client) -> None:
    """A cancelled request says so, once or twice cancelled, and keeps its other fields."""
    request = client.post("/process-request?date=2024-05-01").json()
    where = f"/process-requests/{request['id']}"
    world.clock.advance(5)
    response = client.delete(where)
    assert (response.status_code, response.json()["cancelled_at"]) == (202, "2024-06-01T12:30:05Z")
    assert response.json() == request | {
        "cancelled_at": "2024-06-01T12:30:05Z",
        "updated_at": "2024-06-01T12:30:05Z",
        "version": 2,
    }
    assert client.delete(where).json() == client.get(where).json() == response.json()


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"planned": True, "cities": 1, "served": "1", "outcomes": {Outcome.STORED: "1"}}, "completed"),
        ({"failed_reason": "the list of cities could not be had"}, "failed"),
        (
            {"planned": True, "cities": 1, "outcomes": {Outcome.SKIPPED: "1"}, "cancelled_at": NOW},
            "cancelled",
        ),
    ],
)
def test_cancelling_an_ended_request_is_409(
    world: World, client: Client, changes: dict[str, object], status: str
) -> None:
    """A request that has ended cannot be cancelled: 409, with a problem that says how it ended."""
    record = msgspec.structs.replace(record_of(), **changes)
    write(world, record)
    response = client.delete(f"/process-requests/{record.request_id}")
    assert (response.status_code, response.headers["content-type"]) == (409, "application/problem+json")
    assert response.json()["type"] == "urn:problem-type:tripfold:conflict"
    assert f"it is {status}." in response.json()["detail"]
    assert client.get(f"/process-requests/{record.request_id}").json()["status"] == status


def test_cancelling_an_unknown_request_is_404(client: Client) -> None:
    """A request that does not exist cannot be cancelled."""
    assert [client.delete(f"/process-requests/{text}").status_code for text in (REQUEST, "1")] == [404, 404]


def test_cancelling_keeps_concurrent_progress(world: World) -> None:
    """Progress that is written during a cancellation is kept, and the request is cancelled."""
    record = record_of()
    write(world, record)
    planned = msgspec.structs.replace(record, planned=True, cities=3, version=2)

    class Hasty(ObservedStore):
        async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
            if objects.decode(RequestRecord, self.objects[key].body, key).version == 1:
                self.write(key, objects.encode(planned))
            return await super().compare_and_swap(key, body, etag=etag)

    hasty = Hasty()
    hasty.objects = world.store.objects
    with World(hasty).client() as client:
        body = client.delete(f"/process-requests/{record.request_id}").json()
    assert (body["status"], body["version"], body["counts"]["cities_total"]) == ("planned", 3, 3)
    assert body["cancelled_at"]


@pytest.mark.parametrize("limit", ["0", "501", "-1", "many", "1.5", ""])
def test_invalid_limit_is_400(client: Client, limit: str) -> None:
    """A limit out of its bounds is 400; the problem names it."""
    response = client.get(f"/process-requests?limit={limit}")
    assert response.status_code == 400
    assert response.json()["invalid_parameters"][0]["name"] == "limit"


def test_outage_of_s3_when_reading_is_503_with_retry_after(world: World, client: Client) -> None:
    """While S3 is down both a request and the list of requests are 503 with Retry-After."""
    world.store.down = True
    for path in (f"/process-requests/{REQUEST}", "/process-requests"):
        response = client.get(path)
        assert response.status_code == 503
        assert "retry-after" in response.headers


async def test_time_of_a_request_is_in_its_id() -> None:
    """The time of a request is cut to milliseconds, as its id holds them."""
    world = World()
    clock = Clock(NOW + dt.timedelta(microseconds=1_999))
    record = await requests_module.Requests(world.store, world.publisher, clock=clock).accept(DAY)
    assert record.requested_at == NOW + dt.timedelta(milliseconds=1)


async def test_undecided_conflict_is_retried() -> None:
    """A conflict that S3 did not decide leaves no record, so the write is retried."""

    class Undecided(ObservedStore):
        conflicts = 3

        async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
            if self.conflicts:
                self.conflicts -= 1
                raise CasConflict(key)
            return await super().compare_and_swap(key, body, etag=etag)

    world = World(Undecided())
    record = await requests_module.Requests(world.store, world.publisher, clock=world.clock).accept(DAY)
    assert world.store.bodies(keys.REQUESTS) == {keys.request(record.request_id): objects.encode(record)}


async def test_conflict_that_never_ends_is_503_with_the_request_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """While S3 decides no conflict, the error says that the request is accepted and its record is missing."""

    class Undecided(ObservedStore):
        async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
            if key.startswith(keys.REQUESTS):
                raise CasConflict(key)
            return await super().compare_and_swap(key, body, etag=etag)

    class Accepting(ObservedPublisher):
        async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
            await super().publish(outgoing)
            monkeypatch.setattr(requests_module, "RECORD_DEADLINE_S", 0.01)  # only for the record

    world = World(Undecided())
    world.publisher = Accepting(world.log)
    with pytest.raises(StatusNotWritten):
        await requests_module.Requests(world.store, world.publisher, clock=world.clock).accept(DAY)


async def test_error_of_one_read_ends_the_list() -> None:
    """A list of which one record cannot be read is an error, not a shorter list."""

    class Failing(ObservedStore):
        def _refuse_if_down(self) -> None:
            if len(self.reads) == 3:
                raise StoreUnavailable("one read failed")

    world = World(Failing())
    for place in range(8):
        write(world, record_of(NOW + dt.timedelta(milliseconds=place)))
    with pytest.raises(StoreUnavailable):
        await requests_module.Requests(world.store, world.publisher, clock=world.clock).latest(8)


def test_retry_publishes_the_failed_cities(world: World, client: Client) -> None:
    """A retry publishes the failed cities under the request's id, and the request is running again."""
    record = msgspec.structs.replace(
        record_of(),
        planned=True,
        plan_revision=3,
        cities=3,
        outcomes={Outcome.FAILED: "5", Outcome.STORED: "2"},
        served="2",
        failures={2: Failure(city_id=CityId("7"), city_name="Port Tina", reason="the upstream answered 404")},
    )
    write(world, record)
    response = client.post(f"/process-requests/{record.request_id}/retry")
    body = response.json()
    assert (response.status_code, body["status"], body["failures"], body["version"]) == (202, "running", [], 2)
    assert body["retry"] == {
        "count": 1,
        "retried_at": "2024-06-01T12:30:00Z",
        "cities_total": 2,
        "cities_done": 0,
        "cities_failed": 0,
        "cities": [{"city_id": "7", "city_name": "Port Tina"}],
    }
    assert client.get(f"/process-requests/{record.request_id}").json() == body
    (requested,) = world.published(Topic.PROCESS_REQUESTS)
    assert isinstance(requested, ProcessRequested)
    assert (requested.request_id, requested.date) == (record.request_id, record.date)
    assert requested.retry == Retry(plan_revision=3, positions="5", retried_at=NOW)


def test_a_retry_without_acknowledgement_is_published_again(world: World, client: Client) -> None:
    """The next retry publishes the recorded retry, not another one."""
    record = msgspec.structs.replace(
        record_of(), planned=True, plan_revision=3, cities=1, outcomes={Outcome.FAILED: "1"}
    )
    write(world, record)
    world.publisher.down = True
    assert client.post(f"/process-requests/{record.request_id}/retry").status_code == 503
    world.publisher.down = False
    world.clock.advance(5)
    assert client.post(f"/process-requests/{record.request_id}/retry").json()["retry"]["count"] == 1
    (requested,) = world.published(Topic.PROCESS_REQUESTS)
    assert isinstance(requested, ProcessRequested)
    assert requested.retry == Retry(plan_revision=3, positions="1", retried_at=NOW)


@pytest.mark.parametrize(
    ("outcomes", "detail"),
    [
        ({Outcome.STORED: "1"}, "is completed; it has no failed city to retry"),
        ({}, "retry it when it has ended"),
    ],
)
def test_request_without_failed_cities_is_not_retried(
    world: World, client: Client, outcomes: dict[Outcome, str], detail: str
) -> None:
    """A retry of a running request, or of one without failed cities, is 409 with the reason."""
    record = msgspec.structs.replace(
        record_of(), planned=True, plan_revision=3, cities=1, outcomes=outcomes, served="1" if outcomes else "0"
    )
    write(world, record)
    response = client.post(f"/process-requests/{record.request_id}/retry")
    assert (response.status_code, response.headers["content-type"]) == (409, "application/problem+json")
    assert detail in response.json()["detail"]
    assert not world.published(Topic.PROCESS_REQUESTS)
