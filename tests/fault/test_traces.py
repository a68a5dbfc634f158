"""The events of a request belong to the trace in which it began, whatever breaks."""

from __future__ import annotations

import datetime as dt

from services.aggregate.requests.requeue import Requeue
from services.api.requests.service import Requests
from shared.domain import events, keys, objects
from shared.domain.events import cause_of
from shared.domain.objects import RequestRecord
from shared.domain.topics import Topic
from shared.kafka.records import traceparent_of
from shared.runtime import tracing
from tests.fakes.faults import Break
from tests.fakes.log import MemoryPublisher
from tests.fakes.traces import trace_id_of, traced
from tests.fault.jobs import JobsWorld
from tests.fault.scenarios import WHOLE
from tests.fault.world import DATE, World

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE}-00f067aa0ba902b7-01"
OTHER_TRACE = "0af7651916cd43dd8448eb211c80319c"


async def accept(world: World, trace_id: str = TRACE) -> str:
    """Request the date as the API does, for a caller with a trace; return the request's id."""
    WHOLE.write_into(world.upstream, DATE)
    api = Requests(world.store, MemoryPublisher(world.log, source="api"), clock=world.clock)
    with tracing.server_span("POST", CALLER.replace(TRACE, trace_id), {}):
        return (await api.accept(DATE)).request_id


def traces_of(world: World) -> dict[str | None, set[str | None]]:
    """Return the traces of the published events, by their request; None for those of no request."""
    traces: dict[str | None, set[str | None]] = {}
    for record in world.log.appended:
        headers = dict(record.headers)
        cause = cause_of(headers)
        event = events.decode(record.topic, record.value)
        request_id = cause.request_id if cause else getattr(event, "request_id", None)
        traceparent = traceparent_of(headers)
        traces.setdefault(request_id, set()).add(traceparent and trace_id_of(traceparent))
    return traces


async def test_every_event_of_a_request_has_its_trace_whichever_call_crashes() -> None:
    """After a crash the redelivered record continues the trace; plans and summaries have it, too."""
    with traced():
        calm = World()
        request_id = await accept(calm)
        await calm.run_to_rest()
        assert traces_of(calm) == {request_id: {TRACE}, None: {TRACE}}
        for number in range(len(calm.port_calls.made)):
            world = World({number: Break.DIE_AFTER})
            request_id = await accept(world)
            await world.run_to_rest()
            assert world.deaths == 1
            assert traces_of(world) == {request_id: {TRACE}, None: {TRACE}}, f"crash after call {number}"


async def test_a_retried_city_stays_in_the_trace() -> None:
    """A city that waits for a later attempt comes back through another topic with its trace."""
    with traced():
        world = World()
        world.upstream.cuts = {"1": [0, 0]}
        request_id = await accept(world)
        await world.run_to_rest()
        assert world.log.records(Topic.RETRIES)
        assert traces_of(world) == {request_id: {TRACE}, None: {TRACE}}


async def test_a_requeued_request_stays_in_its_trace() -> None:
    """The record in the bucket has the trace, so the request continues it when Kafka has lost everything."""
    with traced():
        world = World()
        request_id = await accept(world)
        world.lose_the_log()
        world.clock.advance(3600)
        requeue = Requeue(
            world.store,
            MemoryPublisher(world.log, source="aggregate"),
            clock=world.clock,
            after=dt.timedelta(minutes=10),
        )
        assert await requeue.once() == 1
        await world.run_to_rest()
        assert traces_of(world) == {request_id: {TRACE}, None: {TRACE}}


async def test_a_request_that_waits_for_another_continues_its_own_trace() -> None:
    """The end of the first request publishes the waiting one again, which is planned in its own trace."""
    with traced() as exporter:
        world = World()
        first = await accept(world)
        await world.turn("planner")
        second = await accept(world, OTHER_TRACE)
        await world.run_to_rest()
        tasks = [record for record in world.log.appended if record.topic is Topic.CITY_TASKS]
        assert {
            (getattr(events.decode(record.topic, record.value), "request_id", None), trace_id_of(one))
            for record in tasks
            if (one := traceparent_of(dict(record.headers)))
        } == {(first, TRACE), (second, OTHER_TRACE)}
        planned = [span for span in exporter.get_finished_spans() if span.name == "process process-requests"]
        links = {f"{link.context.trace_id:032x}" for span in planned for link in span.links}
    assert links == {TRACE}, "the span of the second request links to the first, whose end caused it"


async def test_traces_do_not_enter_the_summaries() -> None:
    """Summaries have the same bytes with and without traces."""
    plain, world = World(), World()
    await accept(plain)
    await plain.run_to_rest()
    with traced():
        await accept(world)
        await world.run_to_rest()
    assert world.store.bodies("summaries/") == plain.store.bodies("summaries/")
    assert plain.store.bodies("summaries/")


async def test_each_date_of_a_backfill_is_a_trace_of_its_own() -> None:
    """No client posts the requests of a backfill, so each begins a trace, which its record and its event have."""
    with traced():
        world = JobsWorld()
        world.open_backfill(DATE, DATE + dt.timedelta(days=1))
        await world.advance_jobs()
        recorded = {
            record.request_id: {trace_id_of(record.traceparent or "")}
            for key, body in world.store.bodies(keys.REQUESTS).items()
            if (record := objects.decode(RequestRecord, body, key))
        }
        published = traces_of(world)
    assert len(recorded) == 2
    assert recorded == published
    assert len(set.union(*recorded.values())) == 2
