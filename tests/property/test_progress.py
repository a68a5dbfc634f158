"""The laws of a request's progress: events may arrive twice and in any order, with the same result."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from services.aggregate.requests.fold import FAILURES_MAX, ProgressEvent, fold_progress
from shared.domain import bitmap, objects
from shared.domain.events import (
    CityFinished,
    CityFolded,
    CityProgressed,
    Outcome,
    Published,
    RequestFailed,
    RequestPlanned,
)
from shared.domain.ids import CityId, CountrySlug, mint_request_id
from shared.domain.objects import RequestRecord
from shared.domain.requests import Caller, Status, counts_of, new_record, status_of, with_action

DATE = dt.date(2024, 5, 1)
NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
REQUEST = mint_request_id(NOW)
COUNTRIES = [CountrySlug("armenia"), CountrySlug("brasil")]
PLAN_REVISIONS = (7, 8)

published_pairs = st.dictionaries(st.sampled_from(COUNTRIES), st.integers(1, 4), min_size=1, max_size=2)


class History(msgspec.Struct, frozen=True):
    """All events of a request, and the number of cities of each of its plans."""

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


def test_a_new_plan_keeps_the_actions_of_clients_and_the_schema_version() -> None:
    """A request that is planned anew still says who requested it, and under which schema version it is written."""
    requested = with_action(new_record(REQUEST, DATE), Caller(key="nightly"), "process", result="accepted", at=NOW)
    requested = msgspec.structs.replace(requested, schema_version=2)
    first = fold_progress(requested, [planned(7, 1)], NOW)
    second = fold_progress(first, [planned(8, 1)], NOW)
    assert second.actions == requested.actions != ()
    assert second.schema_version == 2


def progressed(revision: int, position: int) -> ProgressEvent:
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
    """Draw how each try of a city of a plan ended; failed and skipped tries published nothing."""
    ends = []
    for outcome in draw(st.lists(st.sampled_from(Outcome), max_size=ends_max)):
        pairs = draw(published_pairs) if outcome in {Outcome.STORED, Outcome.UNCHANGED} else {}
        ends.append(finished(revision, position, outcome, pairs))
    return ends


@st.composite
def histories(draw: st.DrawFn, *, ends_max: int = 3, folds_missing: bool = False) -> History:
    """Draw a request's whole history under one or two plans.

    Every published pair is folded as well, unless ``folds_missing``.
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
        failed = RequestFailed(
            request_id=REQUEST, date=DATE, requested_at=NOW, reason="/cities answered 500", bad_cities_count=2
        )
        happened.append(failed)
    return History(tuple(happened), cities)


def fold_in_batches(happened: Sequence[ProgressEvent], sizes: Sequence[int] = ()) -> RequestRecord:
    """Fold batch by batch, as a service does that stores and reads the record in between."""
    record = new_record(REQUEST, DATE, NOW)
    start = 0
    for size in [*sizes, len(happened)]:
        after = fold_progress(record, happened[start : start + size], NOW)
        start += size
        record = objects.decode(RequestRecord, objects.encode(after), "a record")
    return record


def meaning(record: RequestRecord) -> tuple[Status, int, dict[Outcome, int]]:
    """Return the visible state: the status, the served cities, and the outcome of each city."""
    outcomes = {outcome: int(members, 16) for outcome, members in record.outcomes.items()}
    return status_of(record), int(record.served, 16), {outcome: bits for outcome, bits in outcomes.items() if bits}


def expected_meaning(history: History) -> tuple[Status, int, dict[Outcome, int]]:
    """Compute the same from the history as a set: the highest plan alone, the best outcome, the highest revisions."""
    revision = max(history.cities)
    outcomes: dict[Outcome, int] = {}
    served = done = 0
    started = False
    for position in range(history.cities[revision]):
        about = [
            event
            for event in history.events
            if isinstance(event, CityFinished | CityFolded | CityProgressed)
            and (event.plan_revision, event.position) == (revision, position)
        ]
        started = started or bool(about)
        ends = [event for event in about if isinstance(event, CityFinished)]
        if not ends:
            continue
        best = max((end.outcome for end in ends), key=list(Outcome).index)
        outcomes[best] = outcomes.get(best, 0) | 1 << position
        if best in {Outcome.FAILED, Outcome.SKIPPED}:
            done += 1
        elif all_folded(about):
            done += 1
            served |= 1 << position
    if done == history.cities[revision]:
        return (Status.COMPLETED_WITH_FAILURES if outcomes.get(Outcome.FAILED) else Status.COMPLETED), served, outcomes
    return (Status.RUNNING if started else Status.PLANNED), served, outcomes


def all_folded(about: Sequence[ProgressEvent]) -> bool:
    """Tell whether the highest revision published for each country is folded."""
    folds = [(event.country, event.revision) for event in about if isinstance(event, CityFolded)]
    return all(
        any(country == pair.country and at >= pair.revision for country, at in folds)
        for event in about
        if isinstance(event, CityFinished)
        for pair in event.published
    )


@given(histories(), st.data())
def test_order_duplicates_and_batches_change_nothing(history: History, data: st.DataObject) -> None:
    """Any order, duplicates and batches of all events end in the same status, served cities and outcomes."""
    again = data.draw(st.lists(st.sampled_from(history.events), max_size=5))
    happened = data.draw(st.permutations([*history.events, *again]))
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=5))
    assert meaning(fold_in_batches(happened, sizes)) == expected_meaning(history)


@given(histories(ends_max=1, folds_missing=True), st.data())
def test_a_request_with_unfolded_revisions_is_not_completed(history: History, data: st.DataObject) -> None:
    """A request with revisions that are not folded yet is not completed, in any order of its events."""
    happened = data.draw(st.permutations(history.events))
    assert meaning(fold_in_batches(happened)) == expected_meaning(history)


@given(histories(folds_missing=True), st.data())
def test_completed_means_served(history: History, data: st.DataObject) -> None:
    """In a completed request, each city failed, was skipped, or has its published revisions folded."""
    happened = data.draw(st.permutations(history.events))
    record = new_record(REQUEST, DATE, NOW)
    for count, event in enumerate(happened, 1):
        record = fold_progress(record, [event], NOW)
        if status_of(record) not in {Status.COMPLETED, Status.COMPLETED_WITH_FAILURES}:
            continue
        so_far = happened[:count]
        folds = {
            (event.position, event.country): max(
                other.revision
                for other in so_far
                if isinstance(other, CityFolded)
                and (other.plan_revision, other.position, other.country)
                == (record.plan_revision, event.position, event.country)
            )
            for event in so_far
            if isinstance(event, CityFolded) and event.plan_revision == record.plan_revision
        }
        for position in range(record.cities):
            ends = [
                event
                for event in so_far
                if isinstance(event, CityFinished)
                and (event.plan_revision, event.position) == (record.plan_revision, position)
            ]
            assert any(
                end.outcome in {Outcome.FAILED, Outcome.SKIPPED}
                or all(folds.get((position, pair.country), 0) >= pair.revision for pair in end.published)
                for end in ends
            )


@given(histories())
def test_folding_again_changes_nothing(history: History) -> None:
    """Events that are folded again do not change the visible state."""
    record = fold_in_batches(history.events)
    for event in history.events:
        assert meaning(fold_progress(record, [event], NOW)) == meaning(record)


@given(histories(), st.data())
def test_every_change_has_a_higher_version(history: History, data: st.DataObject) -> None:
    """A changed record has a higher version and the time of the change; an unchanged one is the same object."""
    record = new_record(REQUEST, DATE, NOW)
    later = NOW + dt.timedelta(minutes=1)
    for event in data.draw(st.permutations(history.events)):
        after = fold_progress(record, [event], later)
        if after is not record:
            assert after.version == record.version + 1
            assert after.updated_at == later
        record = after


def test_a_failed_city_that_is_stored_later_completes_its_request() -> None:
    """A retry turns *completed with failures* into *completed*, and the record no longer names the failure."""
    record = fold_in_batches([planned(7, 1), finished(7, 0, Outcome.FAILED, {})])
    assert status_of(record) is Status.COMPLETED_WITH_FAILURES
    assert [failure.reason for failure in record.failures.values()] == ["it answered 404"]
    record = fold_progress(record, [finished(7, 0, Outcome.STORED, {COUNTRIES[0]: 3})], NOW)
    assert status_of(record) is Status.RUNNING
    record = fold_progress(record, [folded(7, 0, COUNTRIES[0], 3)], NOW)
    assert status_of(record) is Status.COMPLETED
    assert record.failures == {}


def test_a_failure_after_a_success_is_ignored() -> None:
    """A city that is served stays served when a later try fails."""
    stored: list[ProgressEvent] = [
        planned(7, 1),
        folded(7, 0, COUNTRIES[0], 3),
        finished(7, 0, Outcome.STORED, {COUNTRIES[0]: 3}),
    ]
    record = fold_in_batches([*stored, finished(7, 0, Outcome.FAILED, {})])
    assert status_of(record) is Status.COMPLETED


def test_a_move_is_served_once_both_countries_are_folded() -> None:
    """A city that moved waits for its new country's statistics and for its old country's retraction."""
    moved = finished(7, 0, Outcome.STORED, {COUNTRIES[0]: 2, COUNTRIES[1]: 2})
    record = fold_in_batches([planned(7, 1), moved, folded(7, 0, COUNTRIES[1], 2)])
    assert status_of(record) is Status.RUNNING
    assert status_of(fold_progress(record, [folded(7, 0, COUNTRIES[0], 2)], NOW)) is Status.COMPLETED


def test_a_request_without_cities_is_completed() -> None:
    """A plan without cities completes its request at once."""
    assert status_of(fold_in_batches([planned(7, 0)])) is Status.COMPLETED


def test_a_request_that_failed_can_still_be_planned() -> None:
    """A request whose city list could not be fetched has failed, until a later try plans it."""
    failed = RequestFailed(request_id=REQUEST, date=DATE, requested_at=NOW, reason="/cities answered 500")
    record = fold_in_batches([failed])
    assert status_of(record) is Status.FAILED
    assert status_of(fold_progress(record, [planned(7, 1)], NOW)) is Status.PLANNED
    late = fold_in_batches([planned(7, 1), failed])
    assert (status_of(late), late.failed_reason) == (Status.PLANNED, None)


def test_a_higher_plan_begins_anew() -> None:
    """Events of an older plan say nothing about the cities of a newer one, whichever came first."""
    old: list[ProgressEvent] = [planned(7, 2), finished(7, 0, Outcome.FAILED, {}), finished(7, 1, Outcome.FAILED, {})]
    record = fold_in_batches([planned(8, 1), *old])
    assert (status_of(record), record.failures) == (Status.PLANNED, {})
    assert meaning(fold_in_batches([*old, planned(8, 1)])) == meaning(record)
    stored: list[ProgressEvent] = [
        planned(7, 2),
        finished(7, 0, Outcome.STORED, {COUNTRIES[0]: 3}),
        folded(7, 0, COUNTRIES[0], 3),
    ]
    assert fold_in_batches([*stored, progressed(7, 1), *old, planned(8, 1)]) == fold_in_batches([planned(8, 1)])


@given(st.permutations([(None, "404"), (None, "500"), (NOW, "bad"), (NOW + dt.timedelta(minutes=1), "404")]))
def test_a_city_reports_the_failure_of_its_latest_retry(ends: list[tuple[dt.datetime | None, str]]) -> None:
    """In any order of failures, the record reports the reason of the last retry."""
    failed = finished(7, 0, Outcome.FAILED, {})
    happened = [msgspec.structs.replace(failed, retried_at=at, reason=reason) for at, reason in ends]
    record = fold_in_batches([planned(7, 1), *happened], [2, 1])
    assert [failure.reason for failure in record.failures.values()] == ["404"]
    assert record.failures[0].retried_at == NOW + dt.timedelta(minutes=1)


def test_failures_are_named_up_to_a_bound() -> None:
    """Every failure counts, but the record names only a bounded number of them."""
    count = FAILURES_MAX + 5
    record = fold_in_batches([planned(7, count), *(finished(7, at, Outcome.FAILED, {}) for at in range(count))])
    assert status_of(record) is Status.COMPLETED_WITH_FAILURES
    assert counts_of(record).cities_failed == count
    assert len(record.failures) == FAILURES_MAX


def test_bytes_and_trips_add_up() -> None:
    """The bytes and trips of a request are those of finished files and of files in progress."""
    record = fold_in_batches([planned(7, 2), progressed(7, 0), finished(7, 1, Outcome.STORED, {COUNTRIES[0]: 3})])
    assert (counts_of(record).bytes_done, counts_of(record).trips_done) == (150, 15)
    assert counts_of(record).bytes_total == 200
    record = fold_progress(record, [folded(7, 1, COUNTRIES[0], 3)], NOW)
    assert (counts_of(record).bytes_done, counts_of(record).cities_done) == (150, 1)


def test_a_bitmap_has_its_added_members() -> None:
    """A bitmap has the members that were added to it, and no others."""
    members = bitmap.member(0) | bitmap.member(3) | bitmap.member(200)
    assert [at for at in range(300) if bitmap.contains(members, at)] == [0, 3, 200]
    assert bitmap.decode(bitmap.encode(members)) == members
    assert bitmap.size(bitmap.encode(members)) == 3


def test_a_city_is_served_once_every_revision_that_it_published_is_folded() -> None:
    """An older revision, or one of two countries alone, does not make a city served."""
    moved = finished(7, 0, Outcome.STORED, {COUNTRIES[0]: 3, COUNTRIES[1]: 3})
    record = fold_progress(new_record(REQUEST, DATE, NOW), [planned(7, 1), moved], NOW)
    for event in (folded(7, 0, COUNTRIES[0], 2), folded(7, 0, COUNTRIES[1], 3), folded(7, 0, COUNTRIES[0], 2)):
        record = fold_progress(record, [event], NOW)
        assert status_of(record) is Status.RUNNING
    assert status_of(fold_progress(record, [folded(7, 0, COUNTRIES[0], 3)], NOW)) is Status.COMPLETED
