"""Settings for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# A busy machine must not fail a test, so examples have no deadline.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

# A shell's background processes ignore SIGINT, and the tests' subprocesses would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
