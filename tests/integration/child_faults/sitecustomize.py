"""Applies the fault of a forked process also to the Python processes that it starts: their path has this folder."""

from tests.integration import faults

faults.apply()
