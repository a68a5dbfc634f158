"""Settings for all tests."""

from __future__ import annotations

import gc
import signal

from hypothesis import settings

# A busy machine must not fail a test, so examples have no deadline.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

# A shell's background processes ignore SIGINT, and the tests' subprocesses would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exempt all that was imported and collected from garbage collection: it stays, and each pass would visit it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter free it at its end, or an extension module reports leaks."""
    gc.unfreeze()
