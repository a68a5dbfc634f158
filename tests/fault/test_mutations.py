"""The harness can fail: each mutation breaks one promise of the design, and its runs notice.

By default each mutation meets the runs that were written for it. TRIPFOLD_MUTATION_HISTORIES sets a number of random
histories for the mutations that random histories can find.
"""

from __future__ import annotations

import os

import pytest

from tests.fault.histories import new_seed, run_histories
from tests.fault.mutations import (
    MUTATIONS,
    Mutation,
    Proof,
    breaking_handlers,
    building_on_a_lost_response,
    crashing_before_the_record,
    damaging_each_object,
    flipping_under_the_aggregate,
    forging_figures,
    hiding_a_lost_request,
    losing_a_record_of_a_retry,
    losing_a_summary,
    losing_the_log,
    racing,
    redelivering_everything,
    refusing_dead_letters,
    spelling_a_country_anew,
    watching_progress,
    watching_the_aggregate,
    writing_ids_differently,
)
from tests.fault.world import World

HISTORIES = int(os.environ.get("TRIPFOLD_MUTATION_HISTORIES", "0"))
FOUND_BY_HISTORIES = {
    "retraction ignored",
    "tombstone dropped",
    "adding instead of replacing",
    "gc ignoring the history",
    "gc of renewed reports",
    "a raw object after its manifest",
    "a city for each type of an id",
    "only the latest requests requeued",
    "a name that never falls",
    "a vanished summary taken for unchanged",
    "a batch tried without end",
    "figures without bounds",
    "a damaged object taken for an outage",
    "mended below the lost revision",
}
"""What 200 histories are enough to find; the others need two rare things at once."""
each_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)


@each_mutation
async def test_each_mutation_is_detected(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one run of a mutation ends with a difference."""
    mutation.patch(monkeypatch)
    async for _ in mutation.proof(mutation.kind):
        return
    pytest.fail("nothing was noticed")


@pytest.mark.parametrize(
    "proof",
    [
        redelivering_everything,
        watching_progress,
        building_on_a_lost_response,
        refusing_dead_letters,
        losing_the_log,
        losing_a_summary,
        breaking_handlers,
        forging_figures,
        spelling_a_country_anew,
        racing,
        watching_the_aggregate,
        flipping_under_the_aggregate,
        writing_ids_differently,
        hiding_a_lost_request,
        damaging_each_object,
        losing_a_record_of_a_retry,
        crashing_before_the_record,
    ],
)
async def test_runs_written_for_mutations_pass_without_one(proof: Proof) -> None:
    """The runs that were written only for mutations pass without a mutation."""
    assert [one async for one in proof(World)] == []


@pytest.mark.timeout(1_200)
@pytest.mark.skipif(not HISTORIES, reason="takes many histories: make mutations")
@pytest.mark.parametrize(
    "mutation",
    [mutation for mutation in MUTATIONS if mutation.name in FOUND_BY_HISTORIES],
    ids=lambda mutation: mutation.name,
)
def test_random_histories_detect_mutations(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random histories find a broken promise by themselves."""
    mutation.patch(monkeypatch)
    with pytest.raises(BaseException):  # noqa: B017, PT011  # whichever way it shows
        run_histories(new_seed(), HISTORIES, kind=mutation.kind, shrink=False)
