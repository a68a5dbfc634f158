"""The base of errors that are told to a person at the terminal."""

from __future__ import annotations


class OperatorError(RuntimeError):
    """Something that the person at the terminal can put right: the message says in a sentence what, and how."""
