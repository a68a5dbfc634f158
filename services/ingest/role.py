"""Which part of the ingest a process runs."""

from __future__ import annotations

import enum


class Role(enum.Enum):
    """The planner of requests, the worker of city-days, or both."""

    ALL = "all"
    PLANNER = "planner"
    WORKER = "worker"
