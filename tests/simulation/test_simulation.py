"""A few simulations in every test run, and the proof that they can fail. ``make simulation`` runs many."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from tests.fault.histories import new_seed
from tests.simulation.mutations import TIME_MUTATIONS, TimeMutation
from tests.simulation.runs import reduced, run_seed
from tests.simulation.simulation import simulate
from tests.simulation.steps import Step, steps_of

HISTORIES = int(os.environ.get("TRIPFOLD_MUTATION_HISTORIES", "0"))
SPAN_MAX_S = 120.0
SHORT_REST_LIMIT_S = 1_500.0
each_mutation = pytest.mark.parametrize("mutation", TIME_MUTATIONS, ids=lambda mutation: mutation.name)


@pytest.mark.parametrize("_number", range(3))
def test_a_random_simulation_ends_right(_number: int) -> None:
    """All checks hold at each write and at rest. A failure prints its steps."""
    seed = new_seed()
    steps = steps_of(seed, span_max_s=SPAN_MAX_S)
    ended = simulate(steps, seed=seed)
    assert not ended.wrong, "\n".join([f"seed {seed}", *map(str, steps), *ended.wrong])


def test_a_seed_repeats_its_simulation() -> None:
    """Two runs of a seed take the same time and make the same calls. Those of another seed differ."""
    first, again, other = (simulate(steps_of(3, span_max_s=SPAN_MAX_S), seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.calls != other.calls


@each_mutation
def test_each_mutation_is_detected(mutation: TimeMutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its schedules fails with a mutation, and passes without it."""
    with monkeypatch.context() as patch:
        mutation.patch(patch)
        noticed = next((one for one in mutation.schedules if wrong_in(one)), None)
    assert noticed is not None
    assert wrong_in(noticed) == ()


def wrong_in(steps: Sequence[Step]) -> tuple[str, ...]:
    """Return what is wrong in the simulation of a short schedule."""
    return simulate(steps, seed=1, rest_limit_s=SHORT_REST_LIMIT_S).wrong


@pytest.mark.timeout(7_200)
@pytest.mark.skipif(not HISTORIES, reason="takes many histories: make mutations")
@each_mutation
def test_random_simulations_detect_mutations(mutation: TimeMutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random schedules find a broken promise by themselves."""
    mutation.patch(monkeypatch)
    first, histories = new_seed(), HISTORIES * (10 if mutation.rare else 1)
    assert any(run_seed(seed).wrong for seed in range(first, first + histories))


def test_a_failing_schedule_is_reduced_to_what_it_needs() -> None:
    """Steps that the failure does not need are left out."""
    needed = [Step(1.0, "pause", ("worker-1", 9.0)), Step(2.0, "request", ())]
    steps = sorted([*needed, *steps_of(3)], key=lambda step: step.at_s)
    assert reduced(steps, lambda fewer: all(one in fewer for one in needed)) == needed
