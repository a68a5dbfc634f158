"""The metrics of all parts of Tripfold in one registry."""

from __future__ import annotations

from typing import get_args

from shared.runtime.metrics import Part, registry_of

REGISTRY = registry_of(*get_args(Part))
