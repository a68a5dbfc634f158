"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# A test that is slow because the machine is busy is not a failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# A shell lets what it runs in the background ignore Ctrl-C, and so would all that tests start and end by it.
signal.signal(signal.SIGINT, signal.default_int_handler)
