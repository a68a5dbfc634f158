"""Both clients: the same methods, and the same results."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncGenerator

import pytest
from tripfold_client import AsyncJob, AsyncTripfold, Job, ProcessingFailed, Tripfold
from tripfold_client.transport import iterate

from tests.fakes.api import DAY, World, planned, record_of_failure, report_of, stats, write, write_report
from tests.serving import served


def methods(kind: type) -> dict[str, tuple[object, ...]]:
    """Return the names, parameters and docstrings of the public methods of a class."""
    return {
        name: (list(inspect.signature(method).parameters.values()), method.__doc__)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.mark.parametrize(("blocking", "for_asyncio"), [(Tripfold, AsyncTripfold), (Job, AsyncJob)])
def test_both_clients_have_the_same_methods(blocking: type, for_asyncio: type) -> None:
    """Each method has the same parameters, defaults and documentation in both clients."""
    assert methods(blocking) == methods(for_asyncio)


def test_every_operation_works_blocking_and_for_asyncio() -> None:
    """A call of each kind over the API gives the same result in both."""
    world = World()
    world.fold_in(stats("armenia"), planned("armenia", city_ids=["7"]))
    write_report(world, report_of("7"))
    with served(world) as url:

        async def call() -> list[object]:
            async with AsyncTripfold(url) as api:
                job = await api.process(DAY)
                return [
                    (await api.set_schedule("daily", "0 6 * * *")).next_run,
                    await api.preview_backfill(DAY, "2024-05-04", only="all", newest_first=True),
                    await api.stats(DAY, DAY, "armenia"),
                    await api.export(DAY, DAY, format="csv"),
                    await api.quarantine(DAY, DAY),
                    [one.name for one in await api.schedules()],
                    job.id,
                ]

        with Tripfold(url) as api:
            job = api.process(DAY)
            results: list[object] = [
                api.set_schedule("daily", "0 6 * * *").next_run,
                api.preview_backfill(DAY, "2024-05-04", only="all", newest_first=True),
                api.stats(DAY, DAY, "armenia"),
                api.export(DAY, DAY, format="csv"),
                api.quarantine(DAY, DAY),
                [one.name for one in api.schedules()],
                job.id,
            ]
            assert list(map(str, asyncio.run(call()))) == list(map(str, results))
            assert api.export(DAY, DAY, format="parquet").startswith(b"PAR1")
            assert api.pause_schedule("daily").paused
            assert not api.resume_schedule("daily").paused
            assert api.run_schedule("daily").last_run is not None
            assert api.schedule("daily").last_run is not None
            api.delete_schedule("daily")
            assert api.schedules() == ()


def test_a_failure_is_an_error_unless_it_is_not_checked() -> None:
    """Waiting for a request with a failed city raises, and names the city and the reason."""
    world = World()
    failed = record_of_failure("8", "Lima", "the upstream answered 404")
    write(world, failed)
    with served(world) as url, Tripfold(url) as api:
        job = api.job(failed.request_id)
        expected = "2024-05-01 completed with failures: 1 city failed: Lima (the upstream answered 404)"
        with pytest.raises(ProcessingFailed, match=re.escape(expected)) as raised:
            job.wait()
        assert raised.value.state == job.state
        seen: list[str] = []
        assert job.wait(check=False, progress=lambda state: seen.append(state.status)).status == seen[-1]


def test_a_blocking_iteration_that_ends_early_is_closed() -> None:
    """A loop that is left closes the connection of its stream."""
    closed = []

    async def numbers() -> AsyncGenerator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    iteration = iterate(numbers())
    assert next(iteration) == 1
    iteration.close()  # type: ignore[attr-defined]  # it is a generator
    assert closed == [True]


async def test_the_blocking_client_works_inside_an_event_loop() -> None:
    """A notebook runs an event loop: the blocking client needs none of its own."""
    with served(World()) as url:
        assert Tripfold(url).stats(DAY, DAY).by_country() == {}
