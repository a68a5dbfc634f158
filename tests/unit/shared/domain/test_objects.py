"""The small objects of the bucket: one encoding, strict decoding, and the head of a summary without its ledger."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from shared.domain import keys, objects, schema
from shared.domain.contribution import Contribution, total_of
from shared.domain.events import Outcome
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import (
    BucketEpoch,
    BucketObject,
    CityUnderWay,
    CorruptObject,
    Countries,
    Failure,
    GenerationPointer,
    LedgerEntry,
    Manifest,
    PastRevision,
    Plan,
    PlanChunks,
    PlannedCity,
    PlannedCountry,
    RequestRecord,
    Summary,
    SummaryHead,
)

DATE = dt.date(2024, 5, 1)
NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
REQUEST = RequestId("018f38bf-1d00-7000-8000-000000000001")
ARMENIA = CountrySlug("armenia")
SUMS = Contribution(trips=2, passengers=90, accidents=1, delay_total_ms=-4_080_000)

SUMMARY = Summary(
    date=DATE,
    country=ARMENIA,
    country_name="Armenia",
    version=12,
    totals=total_of([SUMS]),
    has_data=True,
    cities_reported=1,
    cities_expected=2,
    last_ingested_at=NOW,
    plan_revision=3,
    plans=(PlanChunks(revision=3, chunks=1, cities={0: (CityId("1"), CityId("2"))}),),
    ledger={
        CityId("1"): LedgerEntry(revision=7, city_name="Port Tina", contribution=SUMS, sha256="aa", ingested_at=NOW),
        CityId("9"): LedgerEntry(revision=2),
    },
)
MANIFEST = Manifest(
    date=DATE,
    city_id=CityId("1"),
    city_name="Port Tina",
    country=ARMENIA,
    country_name="Armenia",
    revision=7,
    contribution=SUMS,
    trips_on_other_dates=0,
    attempt="b",
    raw_key="raw/b.json",
    sha256="aa",
    size_bytes=200,
    upstream_url="http://upstream.test/cities/1/stats?date=2024-05-01",
    etag='"v1"',
    last_modified=None,
    plan_revision=3,
    request_id=REQUEST,
    rule_version=1,
    ingested_at=NOW,
    retracted={CountrySlug("brasil"): 6},
    history=(
        PastRevision(
            revision=6, attempt="a", raw_key="raw/a.json", country=ARMENIA, request_id=REQUEST, ingested_at=NOW
        ),
    ),
)
RECORD = RequestRecord(
    request_id=REQUEST,
    date=DATE,
    requested_at=NOW,
    updated_at=NOW,
    plan_revision=3,
    planned=True,
    cities=300,
    outcomes={Outcome.FAILED: "1", Outcome.STORED: f"{1 << 299:x}"},
    served=f"{1 << 299:x}",
    under_way={2: CityUnderWay(bytes_done=5, published={ARMENIA: 7}), 10: CityUnderWay()},
    failures={0: Failure(city_id=CityId("1"), city_name="Port Tina", reason="it answered 404")},
)
EXAMPLES: list[BucketObject] = [
    SUMMARY,
    MANIFEST,
    RECORD,
    Plan(
        date=DATE,
        revision=3,
        request_id=REQUEST,
        planned_at=NOW,
        countries={
            ARMENIA: PlannedCountry(
                name="Armenia", cities=(PlannedCity(city_id=CityId("1"), upstream_id="1", name="Port Tina"),)
            )
        },
        gone={CountrySlug("brasil"): "Brasil"},
    ),
    BucketEpoch(revision_floor=7, born_at=NOW),
    Countries(slugs={"Armenia": ARMENIA, "🇫🇷": CountrySlug("-1f2e3d4c")}),
    GenerationPointer(live=2, building=3, token="t", highest=3),
]
each_object = pytest.mark.parametrize("stored", EXAMPLES, ids=lambda stored: type(stored).__name__)


@each_object
def test_a_decoded_object_equals_the_stored_one(stored: BucketObject) -> None:
    """A decoded object equals the stored one, and equal objects have equal bytes."""
    body = objects.encode(stored)
    assert objects.decode(type(stored), body, "a key") == stored
    assert objects.encode(objects.decode(type(stored), body, "a key")) == body


@each_object
def test_a_later_schema_is_refused(stored: BucketObject) -> None:
    """An object of a later version is not used; the error names it and says what to do."""
    body = objects.encode(msgspec.structs.replace(stored, schema_version=schema.SCHEMA_VERSION + 1))
    with pytest.raises(CorruptObject, match=r"some/key\.json .*upgrade"):
        objects.decode(type(stored), body, "some/key.json")


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b"{}", b'{"live":"1"}', b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_object_are_refused(body: bytes) -> None:
    """The error names the key, whatever the bytes are."""
    with pytest.raises(CorruptObject, match="manifests/x"):
        objects.decode(Manifest, body, "manifests/x")


def test_totals_are_encoded_before_the_ledger() -> None:
    """A reader of totals reads only the first bytes: all it needs comes before plan and ledger."""
    body = objects.encode(SUMMARY)
    assert body.index(b'"plan_revision"') < body.index(b'"plans"') < body.index(b'"ledger"')


@pytest.mark.parametrize(
    "name",
    ["Armenia", 'A","plans":[],"x":"', '","plans":', "\\", '\\","plans":[]', "🇦🇲" * 50, '"' * 300, "\u0000" * 300],
)
def test_a_head_is_read_from_the_first_bytes(name: str) -> None:
    """The head has the values of the whole summary, for any name of the country."""
    summary = msgspec.structs.replace(SUMMARY, country_name=name)
    body = objects.encode(summary)
    first_bytes = body[: body.index(b'"ledger"')]
    head = objects.decode_head(first_bytes, "a summary")
    assert msgspec.structs.asdict(head) == {field: getattr(summary, field) for field in SummaryHead.__struct_fields__}
    assert body.index(b',"plans":[{') < 4_096


@pytest.mark.parametrize(
    "first_bytes", [b"", b"{", objects.encode(SUMMARY)[:100], b'nonsense,"plans":[]', b"\xff" * 50]
)
def test_an_incomplete_head_is_refused(first_bytes: bytes) -> None:
    """A head that is cut or missing is an error that names the key."""
    with pytest.raises(CorruptObject, match="summaries/x"):
        objects.decode_head(first_bytes, "summaries/x")


def test_the_head_of_a_later_schema_is_refused() -> None:
    """A summary of a later version is refused, not read in part."""
    later = msgspec.structs.replace(SUMMARY, schema_version=schema.SCHEMA_VERSION + 1)
    with pytest.raises(CorruptObject, match="upgrade"):
        objects.decode_head(objects.encode(later), "a summary")


def test_a_tombstone_is_small() -> None:
    """A city that left a ledger leaves only its revision."""
    assert msgspec.json.encode(LedgerEntry(revision=7)) == b'{"revision":7}'


def test_an_attempt_is_found_in_the_history() -> None:
    """A compare-and-swap succeeded if its attempt is the current one or one before it."""
    assert MANIFEST.made_by("b")
    assert MANIFEST.made_by("a")
    assert not MANIFEST.made_by("c")


def test_aggregates_fold_into_the_live_generation_first() -> None:
    """The generation being built comes after the live one, and is there only while one is built."""
    assert GenerationPointer().folded == (1,)
    assert GenerationPointer(live=2, building=5, highest=5).folded == (2, 5)


def test_the_key_of_a_summary_reads_back() -> None:
    """A summary's key names its date and country; no other key does."""
    key = keys.summary(3, DATE, CountrySlug("-1f2e3d4c"))
    assert key.startswith(keys.summaries_of_month(3, "2024-05"))
    assert keys.parse_summary(key) == (DATE, "-1f2e3d4c")
    for other in (
        keys.plan(DATE),
        keys.manifest(DATE, CityId("1")),
        keys.BUCKET_EPOCH,
        "summaries/generation=1/date=x/country=y.json",
    ):
        assert keys.parse_summary(other) is None
