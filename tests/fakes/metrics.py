"""The metrics of all parts of Tripfold in one registry."""

from __future__ import annotations

from typing import get_args

from shared.runtime.metrics import Part, registry_of

REGISTRY = registry_of(*get_args(Part))


def value(sample: str, **labels: str) -> float:
    """Return the value of a sample, or 0 if there is none."""
    return REGISTRY.get_sample_value(sample, labels) or 0.0
