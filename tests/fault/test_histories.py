"""Random histories against the oracle: some in every run of the tests, as many as one likes by a variable.

TRIPFOLD_HISTORIES is how many are run, in portions of 200, each from a seed of its own; TRIPFOLD_HISTORIES_SEED is
the seed of the first. A portion that fails says its seed, which finds the same history again.
"""

from __future__ import annotations

import os

import pytest

from tests.fault.histories import HISTORIES_PER_SEED, new_seed, run_histories

HISTORIES = int(os.environ.get("TRIPFOLD_HISTORIES", str(HISTORIES_PER_SEED)))
SEED = os.environ.get("TRIPFOLD_HISTORIES_SEED")


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("portion", range(max(1, HISTORIES // HISTORIES_PER_SEED)))
def test_every_history_ends_right(portion: int) -> None:
    """Whatever happens in whatever order, nothing wrong is served at any step, and at rest all is as it must be."""
    seed = new_seed() if SEED is None else int(SEED) + portion
    try:
        run_histories(seed, min(HISTORIES, HISTORIES_PER_SEED))
    except BaseException as error:
        error.add_note(f"the seed was {seed}: make histories HISTORIES={HISTORIES_PER_SEED} SEED={seed}")
        raise
