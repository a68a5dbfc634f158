"""The laws of a request's progress: events come twice and in any order, and mean the same."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from services.aggregate.progress import FAILURES_MAX, ProgressEvent, fold_progress, new_record
from shared import bitmap, objects
from shared.events import (
    CityFinished,
    CityFolded,
    CityProgressed,
    Outcome,
    Published,
    RequestFailed,
    RequestPlanned,
)
from shared.identity import CityId, CountrySlug, mint_request_id
from shared.objects import RequestRecord
from shared.requests import Status, counts_of, status_of

DATE = dt.date(2024, 5, 1)
NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
REQUEST = mint_request_id(NOW)
COUNTRIES = [CountrySlug("armenia"), CountrySlug("brasil")]
PLAN_REVISIONS = (7, 8)

published_pairs = st.dictionaries(st.sampled_from(COUNTRIES), st.integers(1, 4), min_size=1, max_size=2)


class History(msgspec.Struct, frozen=True):
    """All that happened to a request, and the number of cities of each of its plans."""

    events: tuple[ProgressEvent, ...]
    cities: dict[int, int]


def planned(revision: int, cities: int) -> RequestPlanned:
    return RequestPlanned(
        request_id=REQUEST, date=DATE, requested_at=NOW, plan_revision=revision, cities=cities, countries=2
    )


def finished(revision: int, position: int, outcome: Outcome, pairs: dict[CountrySlug, int]) -> CityFinished:
    return CityFinished(
        request_id=REQUEST,
        date=DATE,
        city_id=CityId(str(position)),
        city_name=f"City {position}",
        plan_revision=revision,
        position=position,
        outcome=outcome,
        reason="it answered 404" if outcome is Outcome.FAILED else None,
        size_bytes=100,
        trips=10,
        published=tuple(Published(country=country, revision=at) for country, at in sorted(pairs.items())),
    )


def folded(revision: int, position: int, country: CountrySlug, at: int) -> CityFolded:
    return CityFolded(
        request_id=REQUEST,
        date=DATE,
        city_id=CityId(str(position)),
        plan_revision=revision,
        position=position,
        country=country,
        revision=at,
    )


def progressed(revision: int, position: int) -> CityProgressed:
    return CityProgressed(
        request_id=REQUEST,
        date=DATE,
        city_id=CityId(str(position)),
        plan_revision=revision,
        position=position,
        bytes_done=50,
        bytes_total=100,
        trips_done=5,
    )


@st.composite
def cities_ends(draw: st.DrawFn, revision: int, position: int, ends_max: int) -> list[CityFinished]:
    """Draw how a city of a plan ended, each time that it was tried: what failed or was skipped published nothing."""
    ends = []
    for outcome in draw(st.lists(st.sampled_from(Outcome), max_size=ends_max)):
        pairs = draw(published_pairs) if outcome in {Outcome.STORED, Outcome.UNCHANGED} else {}
        ends.append(finished(revision, position, outcome, pairs))
    return ends


@st.composite
def histories(draw: st.DrawFn, *, ends_max: int = 3, folds_missing: bool = False) -> History:
    """Draw a request's whole history under one or two plans.

    Every pair that was published is folded as well, unless ``folds_missing``.
    """
    happened: list[ProgressEvent] = []
    cities: dict[int, int] = {}
    for revision in draw(st.sampled_from([PLAN_REVISIONS[:1], PLAN_REVISIONS])):
        cities[revision] = draw(st.integers(0, 3))
        happened.append(planned(revision, cities[revision]))
        for position in range(cities[revision]):
            ends = draw(cities_ends(revision, position, ends_max))
            happened += ends
            folds = [folded(revision, position, pair.country, pair.revision) for end in ends for pair in end.published]
            happened += draw(st.lists(st.sampled_from(folds), unique=True)) if folds_missing and folds else folds
            if draw(st.booleans()):
                happened.append(progressed(revision, position))
    if draw(st.booleans()):
        failed = RequestFailed(request_id=REQUEST, date=DATE, requested_at=NOW, reason="/cities answered 500")
        happened.append(failed)
    return History(tuple(happened), cities)


def fold_in_batches(happened: Sequence[ProgressEvent], sizes: Sequence[int] = ()) -> RequestRecord:
    """Fold batch by batch, as a service would that stores and reads the record in between."""
    record = new_record(REQUEST, DATE, NOW)
    start = 0
    for size in [*sizes, len(happened)]:
        after = fold_progress(record, happened[start : start + size], NOW)
        start += size
        record = objects.decode(RequestRecord, objects.encode(after), "a record")
    return record


def meaning(record: RequestRecord) -> tuple[Status, int, dict[Outcome, int]]:
    """Return what a user is told: the status, which cities are served, and how each ended."""
    outcomes = {outcome: int(members, 16) for outcome, members in record.outcomes.items()}
    return status_of(record), int(record.served, 16), {outcome: bits for outcome, bits in outcomes.items() if bits}


def expected_meaning(history: History) -> tuple[Status, int, dict[Outcome, int]]:
    """Compute the same from the history as a set: the highest plan alone, the best outcome, the highest revisions."""
    revision = max(history.cities)
    outcomes: dict[Outcome, int] = {}
    served = failed = started = 0
    order = list(Outcome)
    for position in range(history.cities[revision]):
        about = [
            event
            for event in history.events
            if isinstance(event, CityFinished | CityFolded | CityProgressed)
            and (event.plan_revision, event.position) == (revision, position)
        ]
        started |= bool(about)
        ends = [event for event in about if isinstance(event, CityFinished)]
        if not ends:
            continue
        best = max((end.outcome for end in ends), key=order.index)
        outcomes[best] = outcomes.get(best, 0) | 1 << position
        pairs = {(pair.country, pair.revision) for end in ends for pair in end.published}
        folds = {(event.country, event.revision) for event in about if isinstance(event, CityFolded)}
        highest = {(country, max(at for other, at in pairs if other == country)) for country, _ in pairs}
        if best in {Outcome.FAILED, Outcome.SKIPPED}:
            failed += best is Outcome.FAILED
            served += best is Outcome.SKIPPED
        elif all(any(c == country and at >= needed for c, at in folds) for country, needed in highest):
            served |= 0
    bits = 0
    done = 0
    for position in range(history.cities[revision]):
        bit = 1 << position
        outcome = next((outcome for outcome, members in outcomes.items() if members & bit), None)
        if outcome in {Outcome.FAILED, Outcome.SKIPPED}:
            done += 1
        elif outcome is not None and _all_folded(history, revision, position):
            done += 1
            bits |= bit
    if done == history.cities[revision]:
        status = Status.COMPLETED_WITH_FAILURES if outcomes.get(Outcome.FAILED) else Status.COMPLETED
    else:
        status = Status.RUNNING if started else Status.PLANNED
    return status, bits, outcomes
