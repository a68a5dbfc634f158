"""The laws of the fold, on any input: colliding revisions, contradicting plans, missing chunks, odd time zones."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from itertools import permutations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from services.aggregate.fold import StatEvent, empty_summary, fold, join, superseded
from shared.domain import events, objects
from shared.domain.contribution import Contribution
from shared.domain.events import CityDayRetracted, CityDayStats, CountryDayPlanned
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import LedgerEntry, Summary
from shared.domain.topics import Topic

DATE = dt.date(2024, 5, 1)
COUNTRY = CountrySlug("armenia")
CITIES = [CityId(name) for name in ("1", "2", "~old%20port")]
TIMES = [
    dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC),
    dt.datetime(2024, 5, 2, 12, tzinfo=dt.timezone(dt.timedelta(hours=2))),  # the same instant, written differently
    dt.datetime(2024, 5, 2, 10, 0, 1, tzinfo=dt.UTC),
]

revisions = st.integers(1, 5)
contributions = st.builds(
    Contribution,
    trips=st.integers(0, 3),
    passengers=st.integers(0, 50),
    accidents=st.integers(0, 2),
    delay_total_ms=st.integers(-5_000, 5_000),
)
stats = st.builds(
    CityDayStats,
    date=st.just(DATE),
    country=st.just(COUNTRY),
    country_name=st.sampled_from(["Armenia", "Armenien"]),
    city_id=st.sampled_from(CITIES),
    city_name=st.sampled_from(["Port Tina", 'North "},"plans":[]']),
    revision=revisions,
    contribution=contributions,
    trips_on_other_dates=st.integers(0, 2),
    raw_key=st.just("raw/date=2024-05-01/city=1/a.json"),
    sha256=st.sampled_from(["aa", "bb"]),
    size_bytes=st.just(2),
    rule_version=st.just(1),
    ingested_at=st.sampled_from(TIMES),
    suspicious=st.sampled_from([UNSET, "0 trips; usual on a Wednesday are 2,000"]),
)
retractions = st.builds(
    CityDayRetracted,
    date=st.just(DATE),
    country=st.just(COUNTRY),
    city_id=st.sampled_from(CITIES),
    revision=revisions,
)
plans = st.builds(
    CountryDayPlanned,
    date=st.just(DATE),
    country=st.just(COUNTRY),
    country_name=st.sampled_from(["Armenia", "Armenien"]),
    plan_revision=revisions,
    city_ids=st.lists(st.sampled_from(CITIES), max_size=3).map(tuple),
    chunk=st.integers(0, 3),
    chunks=st.integers(1, 3),
)
stat_events = st.lists(st.one_of(stats, retractions, plans), max_size=12)


def fold_all(folded: Sequence[StatEvent]) -> Summary:
    return fold(empty_summary(DATE, COUNTRY), folded)


def fold_in_batches(folded: Sequence[StatEvent], sizes: Sequence[int]) -> Summary:
    """Fold batch by batch, as a service does that stores and reads the summary in between."""
    summary = empty_summary(DATE, COUNTRY)
    start = 0
    for size in [*sizes, len(folded)]:
        after = fold(summary, folded[start : start + size])
        start += size
        summary = objects.decode(Summary, objects.encode(after), "a summary")
    return summary


def made_distinct(folded: Sequence[StatEvent]) -> list[StatEvent]:
    """Keep the first event of each city and revision, as in a bucket that never mints a revision twice."""
    first: dict[object, StatEvent] = {}
    for event in folded:
        if isinstance(event, CountryDayPlanned):
            first.setdefault((event.plan_revision, event.chunk), event)
        else:
            first.setdefault((event.city_id, event.revision), event)
    return list(first.values())


@given(stat_events, st.data())
def test_order_duplicates_and_batches_change_nothing(folded: list[StatEvent], data: st.DataObject) -> None:
    """Any order, any duplicates and any split into batches give the same summary, byte for byte."""
    again = data.draw(st.lists(st.sampled_from(folded), max_size=6)) if folded else []
    shuffled = data.draw(st.permutations(folded + again))
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=6))
    assert objects.encode(fold_in_batches(shuffled, sizes)) == objects.encode(fold_all(folded))


@given(stat_events, stat_events)
def test_joining_two_summaries_equals_folding_both_sets_of_events(one: list[StatEvent], other: list[StatEvent]) -> None:
    """Joining an old generation into a new one adds its entries and plans, incomplete ones too, and nothing else."""
    joined = join(fold_all(one), fold_all(other))
    assert objects.encode(joined) == objects.encode(fold_all([*one, *other]))
    assert join(joined, fold_all(other)) is joined


def test_a_join_that_takes_one_of_two_entries_changes_the_summary() -> None:
    """A summary with a newer entry of the first city and an older one of the second changes the first city alone."""
    newer, older = city_at(CITIES[0], TIMES[0]), city_at(CITIES[1], TIMES[0])
    ours = fold_all([newer, msgspec.structs.replace(older, revision=2)])
    theirs = fold_all([msgspec.structs.replace(newer, revision=2), older])
    assert {city: entry.revision for city, entry in join(ours, theirs).ledger.items()} == {CITIES[0]: 2, CITIES[1]: 2}


@given(stats)
def test_the_ledger_entry_of_a_city_has_what_its_event_says(event: CityDayStats) -> None:
    """The ledger keeps the provenance of each city: name, figures, checksum, time and mark of its file."""
    assert fold_all([event]).ledger == {
        event.city_id: LedgerEntry(
            revision=event.revision,
            city_name=event.city_name,
            contribution=event.contribution,
            trips_on_other_dates=event.trips_on_other_dates,
            sha256=event.sha256,
            ingested_at=event.ingested_at,
            suspicious="" if event.suspicious is UNSET else event.suspicious,
            country_name=event.country_name,
        )
    }


@given(stat_events)
def test_the_name_is_that_of_the_plan_in_force_else_of_the_highest_revision(folded: list[StatEvent]) -> None:
    """The name follows from what a replay has. Entries keep names only while no plan is in force."""
    summary = fold_all(folded)
    plan = summary.plans[-1] if summary.plan_revision else None
    entries = [entry for entry in summary.ledger.values() if entry.contribution is not None]
    highest = max((entry.revision for entry in entries), default=0)
    if plan is not None:
        assert summary.country_name == plan.country_name
        assert not any(entry.country_name for entry in entries)
    else:
        assert summary.country_name in {entry.country_name for entry in entries if entry.revision == highest} or {""}
    planned = [event for event in folded if isinstance(event, CountryDayPlanned)]
    of_plan = {event.country_name for event in planned if event.plan_revision == summary.plan_revision}
    assert plan is None or plan.country_name in of_plan


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_one_instant_written_in_two_ways_folds_the_same_in_any_order(order: tuple[int, ...]) -> None:
    """The time of the last file is encoded in the same bytes, whichever city was folded first."""
    cities = [city_at(city_id, at) for city_id, at in zip(CITIES, (TIMES[0], TIMES[1], TIMES[0]), strict=True)]
    assert objects.encode(fold_all([cities[place] for place in order])) == objects.encode(fold_all(cities))


def city_at(city_id: CityId, at: dt.datetime) -> CityDayStats:
    """Return the statistics of a city that was ingested at a time."""
    return CityDayStats(
        date=DATE,
        country=COUNTRY,
        country_name="Armenia",
        city_id=city_id,
        city_name="Port Tina",
        revision=1,
        contribution=Contribution(trips=1, passengers=1, accidents=0, delay_total_ms=0),
        trips_on_other_dates=0,
        raw_key="raw/date=2024-05-01/city=1/a.json",
        sha256="aa",
        size_bytes=2,
        rule_version=1,
        ingested_at=at,
    )


@given(stat_events, stat_events)
def test_folding_again_returns_the_same_object(folded: list[StatEvent], more: list[StatEvent]) -> None:
    """Events that were folded before change nothing, and the fold returns the same object."""
    summary = fold_all(folded + more)
    assert fold(summary, folded) is summary
    assert fold(summary, ()) is summary


@given(stat_events)
def test_a_different_summary_has_different_bytes(folded: list[StatEvent]) -> None:
    """If the fold returns another object, its bytes differ too: no write without a change."""
    summary = empty_summary(DATE, COUNTRY)
    for event in folded:
        after = fold(summary, [event])
        assert (after is summary) == (objects.encode(after) == objects.encode(summary))
        summary = after


@given(stat_events)
def test_totals_are_the_sums_of_the_ledger(folded: list[StatEvent]) -> None:
    """Totals, counts, version and completeness follow from the ledger and the plan in force."""
    summary = fold_all(folded)
    current = [entry for entry in summary.ledger.values() if entry.contribution is not None]
    sums = [0, 0, 0, 0]
    for entry in current:
        assert entry.contribution is not None
        sums = [total + part for total, part in zip(sums, msgspec.structs.astuple(entry.contribution), strict=True)]
    assert list(msgspec.structs.astuple(summary.totals)) == sums
    assert summary.has_data == bool(current)
    assert summary.version == sum(entry.revision for entry in summary.ledger.values()) + summary.plan_revision
    newest = max((entry.ingested_at for entry in current if entry.ingested_at), default=None)
    assert summary.last_ingested_at == newest
    whole = [plan for plan in summary.plans if plan.whole]
    expected = {city for cities in whole[0].cities.values() for city in cities} if whole else None
    reported = {city for city, entry in summary.ledger.items() if entry.contribution is not None}
    assert summary.expected_cities == (expected or set())
    assert summary.cities_expected == len(expected or ())
    assert summary.cities_reported == len((expected or set()) & reported)
    assert summary.complete == (expected is not None and expected <= reported)


@given(stat_events)
def test_the_highest_revision_of_each_city_wins(folded: list[StatEvent]) -> None:
    """The ledger holds each city's highest revision, with the values of an event of that revision."""
    summary = fold_all(folded)
    about_cities = [event for event in folded if not isinstance(event, CountryDayPlanned)]
    assert set(summary.ledger) == {event.city_id for event in about_cities}
    for city_id, entry in summary.ledger.items():
        revision = max(event.revision for event in about_cities if event.city_id == city_id)
        assert entry.revision == revision
        highest = [event for event in about_cities if (event.city_id, event.revision) == (city_id, revision)]
        assert entry.contribution in [
            event.contribution if isinstance(event, CityDayStats) else None for event in highest
        ]


@given(stat_events, stats)
def test_a_higher_revision_replaces(folded: list[StatEvent], correction: CityDayStats) -> None:
    """A revision above all others of its city replaces that city's entry, and changes no other city."""
    correction = msgspec.structs.replace(correction, revision=10)
    before = fold_all(folded)
    after = fold(before, [correction])
    assert after.ledger[correction.city_id].contribution == correction.contribution
    others = {city: entry for city, entry in before.ledger.items() if city != correction.city_id}
    assert {city: entry for city, entry in after.ledger.items() if city != correction.city_id} == others


@given(stat_events, st.sampled_from(CITIES))
def test_a_retraction_removes(folded: list[StatEvent], city_id: CityId) -> None:
    """A retraction removes the city from the totals and leaves a tombstone, which an older revision cannot replace."""
    retraction = CityDayRetracted(date=DATE, country=COUNTRY, city_id=city_id, revision=10)
    summary = fold(fold_all(folded), [retraction])
    assert summary.ledger[city_id].contribution is None
    without = [event for event in folded if isinstance(event, CountryDayPlanned) or event.city_id != city_id]
    assert summary.totals == fold_all(without).totals
    assert fold(summary, folded) is summary


@given(stat_events)
def test_the_version_grows_with_every_change_of_the_totals(folded: list[StatEvent]) -> None:
    """If no revision has two meanings, every change that a reader sees has a higher version."""
    summary = empty_summary(DATE, COUNTRY)
    for event in made_distinct(folded):
        after = fold(summary, [event])
        assert after.version >= summary.version
        if after.totals != summary.totals or after.has_data != summary.has_data:
            assert after.version > summary.version
        summary = after


@given(st.lists(st.one_of(stats, retractions), max_size=12), st.permutations(range(5)))
def test_completeness_changes_only_with_the_version(folded: list[StatEvent], revisions_: list[int]) -> None:
    """For the plans of a planner, completeness and the counts of cities change only with the version."""
    planned: list[StatEvent] = [
        CountryDayPlanned(
            date=DATE,
            country=COUNTRY,
            country_name="Armenia",
            plan_revision=revision + 1,
            city_ids=(CITIES[revision % 3],) if chunk else (CITIES[0],),
            chunk=chunk,
            chunks=2,
        )
        for revision in revisions_
        for chunk in (1, 0)
    ]
    mixed = [event for pair in zip(planned, made_distinct(folded), strict=False) for event in pair] + planned
    summary = empty_summary(DATE, COUNTRY)
    for event in mixed:
        after = fold(summary, [event])
        seen = (after.complete, after.cities_expected, after.cities_reported)
        if seen != (summary.complete, summary.cities_expected, summary.cities_reported):
            assert after.version > summary.version
        summary = after


@given(st.lists(plans, max_size=12))
def test_the_highest_whole_plan_is_in_force(folded: list[CountryDayPlanned]) -> None:
    """A plan counts once all its chunks are known, and the highest such plan counts."""
    known: dict[tuple[int, int], set[int]] = {}
    for event in folded:
        if event.chunk < event.chunks:
            known.setdefault((event.plan_revision, event.chunks), set()).add(event.chunk)
    whole = [plan for plan, chunks in known.items() if len(chunks) == plan[1]]
    assert fold_all(folded).plan_revision == (max(whole)[0] if whole else 0)


@given(stat_events)
def test_an_event_below_a_higher_revision_is_superseded(folded: list[StatEvent]) -> None:
    """An event is superseded exactly if a higher revision of its city, or a higher whole plan, was folded."""
    summary = fold_all(folded)
    for event in folded:
        if isinstance(event, CountryDayPlanned):
            assert superseded(summary, event) == (summary.plan_revision > event.plan_revision)
        else:
            rivals = [
                other.revision
                for other in folded
                if not isinstance(other, CountryDayPlanned) and other.city_id == event.city_id
            ]
            assert superseded(summary, event) == (max(rivals) > event.revision)


@given(stat_events)
def test_a_decoded_summary_equals_the_encoded_one(folded: list[StatEvent]) -> None:
    """A stored summary reads back as it was written, and its head agrees with the whole."""
    summary = fold_all(folded)
    body = objects.encode(summary)
    assert objects.encode(objects.decode(Summary, body, "a summary")) == body
    head = objects.decode_head(body, "a summary")
    assert msgspec.structs.asdict(head) == {field: getattr(summary, field) for field in head.__struct_fields__}


@pytest.mark.parametrize(
    "written", ["2024-05-02T10:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2024-05-02T10:00:00Z"]
)
def test_every_event_that_decodes_can_be_folded(written: str) -> None:
    """An event is either poison or can be folded with any other: no time in it stops the fold."""
    bodies = [events.encode(city_at(city_id, TIMES[0])) for city_id in CITIES[:2]]
    bodies[1] = bodies[1].replace(b"2024-05-02T10:00:00Z", written.encode())
    decoded: list[StatEvent] = []
    for body in bodies:
        try:
            event = events.decode(Topic.CITY_STATS, body)
        except events.PoisonRecord:
            continue
        assert isinstance(event, CityDayStats)
        decoded.append(event)
    assert objects.encode(fold_all(decoded)) == objects.encode(fold_all(decoded[::-1]))


def test_an_event_of_another_country_day_is_refused() -> None:
    """Folding an event into a summary of another country is an error, whatever the batch."""
    retraction = CityDayRetracted(date=DATE, country=CountrySlug("brasil"), city_id=CITIES[0], revision=1)
    with pytest.raises(ValueError, match="brasil"):
        fold_all([retraction])
    with pytest.raises(ValueError, match="2024-05-01/brasil is not 2024-05-01/armenia"):
        join(fold_all([]), empty_summary(DATE, CountrySlug("brasil")))


def test_an_empty_plan_is_complete() -> None:
    """A country-day without expected cities is complete, and has no data."""
    summary = fold_all(
        [CountryDayPlanned(date=DATE, country=COUNTRY, country_name="Armenia", plan_revision=3, city_ids=())]
    )
    assert (summary.complete, summary.has_data, summary.version) == (True, False, 3)


def test_without_a_whole_plan_nothing_is_complete() -> None:
    """A country-day without a whole plan is not complete, even if every named city has reported."""
    chunk = CountryDayPlanned(
        date=DATE, country=COUNTRY, country_name="Armenia", plan_revision=3, city_ids=(), chunk=0, chunks=2
    )
    assert not fold_all([chunk]).complete
    assert fold_all([chunk, msgspec.structs.replace(chunk, chunk=1)]).complete


@given(plans, plans)
def test_one_of_contradicting_chunks_counts_in_any_order(one: CountryDayPlanned, other: CountryDayPlanned) -> None:
    """Two chunks of one plan with the same number and other cities fold and join to the same result in any order."""
    other = msgspec.structs.replace(other, plan_revision=one.plan_revision, chunk=one.chunk, chunks=one.chunks)
    assert objects.encode(fold_all([one, other])) == objects.encode(fold_all([other, one]))
    assert objects.encode(join(fold_all([one]), fold_all([other]))) == objects.encode(fold_all([one, other]))
