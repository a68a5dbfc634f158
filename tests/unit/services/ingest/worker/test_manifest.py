"""The next revision of a city-day, from the one before it and what was found."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
import pytest

from services.ingest.parsing.parser import DEFAULT_RULES, FileTotals
from services.ingest.parsing.trips import RULE_VERSION
from services.ingest.upstream.port import Validators
from services.ingest.worker.manifest import NewFile, Place, next_manifest, reissued, reprocessed, validators_of
from services.ingest.worker.streaming import StreamedFile
from shared.domain import keys, objects
from shared.domain.contribution import Contribution
from shared.domain.events import CityDayRetracted, CityDayStats, IngestCity
from shared.domain.file_rules import BadRecordsMax, FileRules, RecordsForm
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import HISTORY_LENGTH_MAX, BucketEpoch, Manifest
from shared.domain.outbox import events_of_manifest
from shared.storage.bucket_epoch import next_revision, read_bucket_epoch
from tests.fakes.store import MemoryStore

DATE = dt.date(2024, 5, 1)
NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
BASE = 1_000
URL = "http://upstream.test/cities/1/stats?date=2024-05-01"
ARMENIA, BRASIL, CHILE = (CountrySlug(slug) for slug in ("armenia", "brasil", "chile"))


def task(number: int = 1, *, country: CountrySlug = ARMENIA, plan_revision: int = 1) -> IngestCity:
    return IngestCity(
        request_id=RequestId(f"018f38bf-1d00-7000-8000-{number:012x}"),
        date=DATE,
        city_id=CityId("1"),
        upstream_id="1",
        city_name="Port Tina",
        country=country,
        country_name=country.title(),
        plan_revision=plan_revision,
        position=0,
    )


def place(country: CountrySlug, plan_revision: int = 1) -> Place:
    return Place(country=country, country_name=country.title(), plan_revision=plan_revision)


def file(sha256: str, *, raw_key: str = "", etag: str | None = None) -> NewFile:
    folded = FileTotals(
        contribution=Contribution(trips=len(sha256), passengers=1, accidents=0, delay_total_ms=5),
        trips_on_other_dates=1,
        records=len(sha256),
    )
    return NewFile(
        raw_key=raw_key or f"raw/{sha256}.json",
        url=URL,
        validators=Validators(etag=etag),
        streamed=StreamedFile(sha256=sha256, size_bytes=100, totals=folded),
    )


def following(
    previous: Manifest | None,
    asked: IngestCity,
    where: Place,
    found: NewFile | None,
    *,
    attempt: str = "next",
    rules: FileRules = DEFAULT_RULES,
) -> Manifest | None:
    return next_manifest(previous, asked, where, found, attempt=attempt, now=NOW, revision_floor=BASE, rules=rules)


def first(country: CountrySlug = ARMENIA) -> Manifest:
    manifest = following(None, task(country=country), place(country), file("aa"), attempt="first")
    assert manifest is not None
    return manifest


def moved(previous: Manifest, country: CountrySlug, *, plan_revision: int, attempt: str = "next") -> Manifest:
    asked = task(plan_revision, country=country, plan_revision=plan_revision)
    manifest = following(previous, asked, place(country, plan_revision), None, attempt=attempt)
    assert manifest is not None
    return manifest


def test_a_first_file_is_the_first_revision() -> None:
    """The first revision of a bucket is its base, with nothing before it and nothing retracted."""
    manifest = first()
    assert (manifest.revision, manifest.country, manifest.history, manifest.retracted) == (BASE, ARMENIA, (), {})
    assert (manifest.raw_key, manifest.sha256, manifest.trips_on_other_dates) == ("raw/aa.json", "aa", 1)


def test_the_same_bytes_change_nothing() -> None:
    """Equal bytes, country and rules are no revision, whoever asks and whatever the attempt was called."""
    assert following(first(), task(2, plan_revision=2), place(ARMENIA, 2), file("aa", raw_key="raw/other.json")) is None


def test_an_upstream_response_304_changes_nothing() -> None:
    """A conditional answer without a body is no revision while the country is the same."""
    assert following(first(), task(2), place(ARMENIA), None) is None


def test_a_new_name_of_a_city_is_a_revision_of_the_same_file() -> None:
    """A city that was renamed has its new name although its file is unchanged; an older plan renames nothing."""
    renamed = msgspec.structs.replace(task(2, plan_revision=2), city_name="Renamed")
    manifest = following(first(), renamed, place(ARMENIA, 2), None)
    assert manifest is not None
    assert (manifest.revision, manifest.city_name, manifest.retracted) == (BASE + 1, "Renamed", {})
    assert manifest.raw_key == first().raw_key
    assert following(manifest, task(3, plan_revision=1), place(ARMENIA, 1), None) is None


def test_other_bytes_are_a_new_revision() -> None:
    """A corrected file replaces the one before, which the history keeps."""
    before = first()
    manifest = following(before, task(2, plan_revision=2), place(ARMENIA, 2), file("bbb"))
    assert manifest is not None
    assert (manifest.revision, manifest.sha256, manifest.contribution.trips) == (BASE + 1, "bbb", 3)
    assert [(past.revision, past.attempt, past.raw_key) for past in manifest.history] == [
        (before.revision, "first", "raw/aa.json")
    ]
    assert manifest.plan_revision == 2
    assert manifest.retracted == {}


def test_a_changed_rule_is_a_new_revision_of_the_same_bytes() -> None:
    """A file that was folded by other rules is folded again, though its bytes are the same."""
    before = msgspec.structs.replace(first(), rule_version=RULE_VERSION - 1)
    manifest = following(before, task(2), place(ARMENIA), file("aa", raw_key="raw/again.json"))
    assert manifest is not None
    assert (manifest.revision, manifest.rule_version, manifest.raw_key) == (BASE + 1, RULE_VERSION, "raw/again.json")


@pytest.mark.parametrize(
    ("before", "rules", "alike"),
    [
        ({}, FileRules(form=RecordsForm.parse("/data/trips")), False),
        ({"records_form": "/data/trips"}, FileRules(form=RecordsForm.parse("/data/trips")), True),
        ({"records_form": "lines"}, DEFAULT_RULES, False),
        ({"bad_records": 2}, FileRules(bad_records_max=BadRecordsMax.parse("2")), True),
        ({"bad_records": 2}, FileRules(bad_records_max=BadRecordsMax.parse("100%")), True),
        ({"bad_records": 2}, FileRules(bad_records_max=BadRecordsMax.parse("1")), False),
        ({"trips_on_other_dates": 0}, FileRules(other_dates_are_bad=True), True),
        ({"trips_on_other_dates": 1}, FileRules(other_dates_are_bad=True), False),
        (
            {"trips_on_other_dates": 0, "bad_records": 1},
            FileRules(bad_records_max=BadRecordsMax.parse("5"), other_dates_are_bad=True),
            True,
        ),
        ({"trips_on_other_dates": 0, "other_dates_are_bad": True}, DEFAULT_RULES, True),
        (
            {"trips_on_other_dates": 0, "other_dates_are_bad": True, "bad_records": 1},
            FileRules(bad_records_max=BadRecordsMax.parse("5")),
            False,
        ),
    ],
)
def test_the_same_bytes_are_totalled_again_if_changed_settings_could_change_their_totals(
    before: dict[str, Any], rules: FileRules, alike: bool
) -> None:
    """Another form always counts; another limit of bad records or word on other dates, for a file that it concerns."""
    stored = msgspec.structs.replace(first(), etag='"v1"', **before)
    manifest = following(stored, task(2), place(ARMENIA), file("aa", raw_key="raw/again.json"), rules=rules)
    assert (manifest is None) == alike
    assert (validators_of(stored, URL, rules) is not None) == alike


@pytest.mark.parametrize("found", [None, file("aa", raw_key="raw/other.json")])
def test_a_move_alone_names_the_same_raw_object(found: NewFile | None) -> None:
    """A city that moved without new bytes is a revision of the stored file, retracted where it was."""
    before = first()
    manifest = following(before, task(2, country=BRASIL, plan_revision=2), place(BRASIL, 2), found)
    assert manifest is not None
    assert (manifest.revision, manifest.country, manifest.country_name) == (BASE + 1, BRASIL, "Brasil")
    assert (manifest.raw_key, manifest.contribution) == (before.raw_key, before.contribution)
    assert manifest.retracted == {ARMENIA: BASE + 1}
    assert manifest.attempt == "next"


def test_a_move_with_new_bytes_is_one_revision() -> None:
    """A city that moved with a corrected file counts the new file in the new country."""
    manifest = following(first(), task(2, country=BRASIL, plan_revision=2), place(BRASIL, 2), file("bbb"))
    assert manifest is not None
    assert (manifest.revision, manifest.country, manifest.raw_key) == (BASE + 1, BRASIL, "raw/bbb.json")
    assert manifest.retracted == {ARMENIA: BASE + 1}


def test_a_move_back_lifts_the_retraction() -> None:
    """A city that came back is retracted where it went meanwhile, and no longer where it is."""
    back = moved(moved(first(), BRASIL, plan_revision=2), ARMENIA, plan_revision=3)
    assert (back.country, back.retracted) == (ARMENIA, {BRASIL: BASE + 2})


def test_every_former_country_stays_retracted() -> None:
    """Each country is retracted by the revision that left it, so that no event of the way can be missing."""
    manifest = moved(moved(first(), BRASIL, plan_revision=2), CHILE, plan_revision=3)
    assert manifest.retracted == {ARMENIA: BASE + 1, BRASIL: BASE + 2}
    stats, *retractions = events_of_manifest(manifest)
    assert isinstance(stats, CityDayStats)
    assert (stats.country, stats.revision) == (CHILE, BASE + 2)
    assert [(type(event), event.country, event.revision) for event in retractions] == [
        (CityDayRetracted, ARMENIA, BASE + 1),
        (CityDayRetracted, BRASIL, BASE + 2),
    ]


def test_an_older_plan_never_lowers_the_plan() -> None:
    """A task of an older plan that brings new bytes leaves the manifest with the newer plan's revision."""
    before = moved(first(), BRASIL, plan_revision=5)
    manifest = following(before, task(2, plan_revision=3), place(BRASIL, 5), file("bbb"))
    assert manifest is not None
    assert (manifest.country, manifest.plan_revision) == (BRASIL, 5)


def test_a_place_from_a_newer_plan_than_the_task_keeps_that_plan() -> None:
    """Where a newer plan chose the country, the manifest says so, and the task's own plan cannot undo it."""
    manifest = following(first(), task(2, plan_revision=3), place(BRASIL, 7), None)
    assert manifest is not None
    assert manifest.plan_revision == 7


def test_the_history_is_bounded_and_the_latest_first() -> None:
    """However often a city-day changes, its manifest stays small and names the last revisions before it."""
    manifest = first()
    for number in range(HISTORY_LENGTH_MAX + 5):
        country = BRASIL if number % 2 == 0 else ARMENIA
        manifest = moved(manifest, country, plan_revision=number + 2, attempt=f"attempt-{number}")
    assert len(manifest.history) == HISTORY_LENGTH_MAX
    revisions = [past.revision for past in manifest.history]
    assert revisions == sorted(revisions, reverse=True)
    assert revisions[0] == manifest.revision - 1
    assert manifest.made_by(f"attempt-{HISTORY_LENGTH_MAX + 4}")
    assert manifest.made_by(f"attempt-{HISTORY_LENGTH_MAX + 3}")
    assert not manifest.made_by("first")


@pytest.mark.parametrize(("previous", "revision_floor", "expected"), [(None, 7, 7), (3, 7, 7), (7, 7, 8), (9, 7, 10)])
def test_a_revision_grows_and_never_falls_below_the_floor(
    previous: int | None, revision_floor: int, expected: int
) -> None:
    """The next revision is one more than the last, and at least the floor of the bucket."""
    assert next_revision(previous, revision_floor) == expected


def test_validators_count_at_their_own_url_and_under_the_present_rules() -> None:
    """A conditional request names only what this URL gave for a file that the present rules folded."""
    manifest = msgspec.structs.replace(first(), etag='"v1"', last_modified="Thu, 02 May 2024 09:00:00 GMT")
    assert validators_of(manifest, URL, DEFAULT_RULES) == Validators(
        etag='"v1"', last_modified="Thu, 02 May 2024 09:00:00 GMT"
    )
    assert validators_of(manifest, URL.replace("upstream", "mirror"), DEFAULT_RULES) is None
    assert validators_of(msgspec.structs.replace(manifest, rule_version=RULE_VERSION - 1), URL, DEFAULT_RULES) is None
    assert validators_of(first(), URL, DEFAULT_RULES) is None
    assert validators_of(None, URL, DEFAULT_RULES) is None


def test_a_late_task_without_a_move_does_not_lower_the_plan() -> None:
    """A task of an older plan that brings a new file leaves the newest plan that a revision was made under."""
    before = msgspec.structs.replace(first(), plan_revision=5)
    manifest = following(before, task(2, plan_revision=3), place(ARMENIA, 3), file("bbb"))
    assert manifest is not None
    assert manifest.plan_revision == 5


async def test_one_of_two_racing_bucket_epochs_counts() -> None:
    """A process that loses the race to write the bucket epoch uses the revision floor of the winner."""
    store = MemoryStore(lambda: NOW)
    other = BucketEpoch(revision_floor=BASE, born_at=NOW)
    compare_and_swap = store.compare_and_swap

    async def overtaken(key: str, body: bytes, *, etag: str | None) -> str:
        store.compare_and_swap = compare_and_swap  # type: ignore[method-assign]  # once
        store.write(keys.BUCKET_EPOCH, objects.encode(other))
        return await compare_and_swap(key, body, etag=etag)

    store.compare_and_swap = overtaken  # type: ignore[method-assign]  # another process comes first
    assert await read_bucket_epoch(store, lambda: NOW) == other


def test_a_suspicious_mark_stays_with_the_file() -> None:
    """A reprocessed, reissued or moved file keeps its mark; a new file begins without one, until it is judged."""
    marked = msgspec.structs.replace(first(), suspicious="2 trips; usual on a Wednesday are 2,000")
    totals = msgspec.structs.replace(file("aa").streamed.totals, bad_records=1)
    kept = [
        reprocessed(
            marked,
            totals,
            request_id=marked.request_id,
            rules=DEFAULT_RULES,
            attempt="next",
            now=NOW,
            revision_floor=BASE,
        ),
        reissued(marked, attempt="next", revision_floor=BASE),
        moved(marked, BRASIL, plan_revision=2),
    ]
    assert [one and one.suspicious for one in kept] == [marked.suspicious] * 3
    corrected = following(marked, task(2), place(ARMENIA), file("bbb"))
    assert corrected is not None
    assert corrected.suspicious is None
