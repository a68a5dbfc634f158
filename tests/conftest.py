"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A test that is slow because the machine is busy is not a failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
