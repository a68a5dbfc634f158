"""The base of errors that a command prints to its user."""

from __future__ import annotations


class OperatorError(RuntimeError):
    """An error that an operator can fix. Its message says what happened and what to do."""
