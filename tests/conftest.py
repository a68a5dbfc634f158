"""Settings for all tests."""

from __future__ import annotations

import atexit
import gc
import signal

from hypothesis import settings

# A busy machine must not fail a test, so examples have no deadline.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

# A shell's background processes ignore SIGINT, and the tests' subprocesses would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Imported modules and collected tests stay until the end, and each garbage collection would visit them.
gc.disable()
atexit.register(gc.unfreeze)  # so that the interpreter frees them; otherwise an extension module reports leaks


def pytest_collection_finish() -> None:
    """Collect from now on, without what is there already, and seldom: a test allocates little."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()
