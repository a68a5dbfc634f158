"""Every figure and revision of events and stored objects is bounded where it is decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import pytest

from services.aggregate.fold import empty_summary, fold
from services.api.requests.idempotency import Claim
from shared.domain import events, objects
from shared.domain.contribution import COUNTRY_CITIES_MAX, FIGURE_MAX, TOTAL_MAX, Contribution, Totals, total_of
from shared.domain.events import EVENT_TYPES, Cause, PoisonRecord
from shared.domain.ids import EXACT_MAX, REVISION_MAX
from shared.domain.objects import BucketObject, CorruptObject, Summary
from shared.domain.tables import TableRecord
from shared.domain.topics import Topic
from tests.fakes.builders import FORGED_STATS, STATS

KEY = "summaries/generation=1/date=2024-05-01/country=armenia.json"
LARGEST = Contribution(**dict.fromkeys(Contribution.__struct_fields__, FIGURE_MAX))


def subclasses_of(kind: type[BucketObject]) -> Iterator[type[BucketObject]]:
    for one in kind.__subclasses__():
        yield one
        yield from subclasses_of(one)


def unbounded(schema: object, path: str = "") -> Iterator[str]:
    """Name the integers of a JSON schema that have no least or no greatest value."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer":
            least, most = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
            if least.isdisjoint(schema) or most.isdisjoint(schema):
                yield path
        for name, value in schema.items():
            yield from unbounded(value, f"{path}/{name}")
    elif isinstance(schema, list):
        for value in schema:
            yield from unbounded(value, path)


def test_every_integer_is_bounded() -> None:
    """No field of an event, of its headers or of a stored object takes any integer."""
    stored = set(subclasses_of(BucketObject)) | {Claim, TableRecord}
    kinds = {*stored, Cause, *(kind for kinds in EVENT_TYPES.values() for kind in kinds)}
    _, components = msgspec.json.schema_components(kinds)
    assert len(components) > 20
    assert list(unbounded(components)) == []


@pytest.mark.parametrize("value", FORGED_STATS, ids=range(len(FORGED_STATS)))
def test_a_record_beyond_a_bound_is_poison(value: bytes) -> None:
    """It goes to the dead letters, and stops no reader of the topic."""
    with pytest.raises(PoisonRecord):
        events.decode(Topic.CITY_STATS, value)


def test_a_record_at_the_bounds_is_folded_and_stored() -> None:
    """The greatest figures and revision are read, and their summary too."""
    event = msgspec.structs.replace(
        STATS, revision=REVISION_MAX, contribution=msgspec.structs.replace(LARGEST, delay_total_ms=-FIGURE_MAX)
    )
    assert events.decode(Topic.CITY_STATS, events.encode(event)) == event
    summary = fold(empty_summary(event.date, event.country), [event])
    assert objects.decode(Summary, objects.encode(summary), KEY) == summary
    assert objects.decode_head(objects.encode(summary), KEY).totals == summary.totals


def test_the_totals_of_the_greatest_plan_fit_into_64_bits() -> None:
    """Whatever the cities of a country report, their totals are encoded and read."""
    totals = total_of([LARGEST] * COUNTRY_CITIES_MAX)
    assert totals.trips <= TOTAL_MAX == 2**63 - 1
    assert msgspec.json.decode(msgspec.json.encode(totals), type=Totals) == totals


@pytest.mark.parametrize("totals", [{"trips": -1}, {"trips": EXACT_MAX + 1}, {"delay_total_ms": 10**400}])
def test_a_summary_with_figures_that_cannot_be_served_is_unreadable(totals: dict[str, int]) -> None:
    """Its error names it, so that its own country-day alone is left out."""
    summary = fold(empty_summary(STATS.date, STATS.country), [STATS])
    body = json.loads(objects.encode(summary))
    body["totals"] |= totals
    with pytest.raises(CorruptObject, match=KEY):
        objects.decode_head(json.dumps(body, separators=(",", ":")).encode(), KEY)
