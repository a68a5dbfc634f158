"""Random histories against the oracle: a few in every test run, and as many as a variable sets.

TRIPFOLD_HISTORIES is the number of histories, in portions of 200 with a seed each. TRIPFOLD_HISTORIES_SEED is the first
seed. A failing portion prints its seed, which repeats its histories.
"""

from __future__ import annotations

import os

import pytest

from tests.fault.histories import HISTORIES_PER_SEED, new_seed, run_histories

HISTORIES = int(os.environ.get("TRIPFOLD_HISTORIES", "100"))
SEED = os.environ.get("TRIPFOLD_HISTORIES_SEED")


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("portion", range(max(1, HISTORIES // HISTORIES_PER_SEED)))
def test_random_histories_match_the_oracle(portion: int) -> None:
    """In any order of steps, all checks hold after each step, and the world at rest matches the oracle."""
    seed = new_seed() if SEED is None else int(SEED) + portion
    histories = min(HISTORIES, HISTORIES_PER_SEED)
    try:
        run_histories(seed, histories)
    except BaseException as error:
        error.add_note(f"the seed was {seed}: make histories HISTORIES={histories} SEED={seed}")
        raise
