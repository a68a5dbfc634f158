"""The ledger of a country-day: the contribution of each city, and its source. Pure."""

from __future__ import annotations

import datetime as dt
import enum
from bisect import bisect_right
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import quote

import msgspec

from services.api.statistics.model import DayStats, day_detail
from shared.domain.contribution import Contribution
from shared.domain.ids import CityId
from shared.domain.objects import LedgerEntry, Manifest, Summary


class CityStanding(enum.Enum):
    """The state of a city in its country-day."""

    REPORTED = "reported"
    LEFT = "left"
    MISSING = "missing"
    RETRACTED = "retracted"


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """The source of a city's contribution, from the manifest of the city-day.

    The manifest is written before the ledger, so its revision can be higher for a moment.
    """

    revision: Annotated[int, msgspec.Meta(description="The revision in the manifest.", examples=[152703181])]
    country: Annotated[
        str, msgspec.Meta(description="The country that the city counts for at present.", examples=["armenia"])
    ]
    request_id: Annotated[str, msgspec.Meta(description="The request that stored this revision.")]
    upstream_url: Annotated[str, msgspec.Meta(examples=["http://upstream.example/cities/7/stats?date=2024-05-01"])]
    raw_key: Annotated[
        str,
        msgspec.Meta(
            description="The object of the bucket that holds the file, unless it has expired.",
            examples=["raw/date=2024-05-01/city=7/4f2c1f0f9a6c4c0f8e0f3f8f6f0d2b11.json"],
        ),
    ]
    sha256: Annotated[str, msgspec.Meta(description="The SHA-256 of the file, in hexadecimal.")]
    size_bytes: Annotated[int, msgspec.Meta(ge=0, examples=[104857600])]
    etag: Annotated[str | None, msgspec.Meta(description="The upstream's ETag of the file.")]
    last_modified: Annotated[str | None, msgspec.Meta(description="The upstream's Last-Modified of the file.")]
    ingested_at: dt.datetime
    bad_records: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="Records of the file that break a rule and were left out, as the settings allow."
        ),
    ]
    rule_version: Annotated[int, msgspec.Meta(description="The version of the rules that the file was parsed with.")]
    plan_revision: Annotated[
        int, msgspec.Meta(description="The revision of the plan that assigned the city to its country.")
    ]


class LedgerCity(msgspec.Struct, frozen=True, kw_only=True):
    """One city of a country-day.

    ``reported``: expected and counted. ``left``: counted, and no longer in the upstream's list. ``missing``: expected
    and not counted. ``retracted``: moved to another country, and not counted here.
    """

    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[
        str, msgspec.Meta(description="The name in its file, or else in the date's plan.", examples=["Port Tina"])
    ]
    standing: CityStanding
    revision: Annotated[
        int | None, msgspec.Meta(description="The city's revision in the ledger; null: none.", examples=[152703181])
    ]
    contribution: Annotated[Contribution | None, msgspec.Meta(description="The city's share of the day's totals.")]
    trips_on_other_dates: Annotated[
        int, msgspec.Meta(ge=0, description="Counted trips whose departure has another date.")
    ]
    suspicious: Annotated[
        str | None,
        msgspec.Meta(
            description="Why the volume of the counted file is unusual; null: it is not.",
            examples=["4,100 trips; usual on a Wednesday are 9,012"],
        ),
    ]
    provenance: Provenance | None


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """One country-day: its totals, and a page of its cities, sorted by city id."""

    country: Annotated[str, msgspec.Meta(examples=["armenia"])]
    date: dt.date
    totals: DayStats
    cities: tuple[LedgerCity, ...]
    next: Annotated[
        str | None,
        msgspec.Meta(
            description="The path of the next page; null: this is the last page.",
            examples=["/country-stats/armenia/2024-05-01?limit=100&after=7"],
        ),
    ]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """The ids of the cities on a page of a ledger. ``last`` is whether it is the last page."""

    city_ids: tuple[CityId, ...]
    last: bool


def parse_date(text: str) -> dt.date | None:
    """Return the date in a path, or None if it is malformed."""
    try:
        return msgspec.convert(text, dt.date)
    except msgspec.ValidationError:
        return None


def page_of(summary: Summary, *, after: str, limit: int) -> Page:
    """Return the first ``limit`` cities of the ledger or plan whose ids are greater than ``after``."""
    city_ids = sorted(summary.ledger.keys() | summary.expected_cities)
    start = bisect_right(city_ids, after)
    return Page(city_ids=tuple(city_ids[start : start + limit]), last=start + limit >= len(city_ids))


def needs_names(summary: Summary, page: Page, manifests: Mapping[CityId, Manifest]) -> bool:
    """Return whether a city of the page has a name in neither ledger nor manifest."""
    return any(not _name_of(summary.ledger.get(city_id), manifests.get(city_id)) for city_id in page.city_ids)


def ledger_of(
    summary: Summary,
    page: Page,
    manifests: Mapping[CityId, Manifest],
    *,
    limit: int,
    planned_names: Mapping[CityId, str],
) -> Ledger:
    """Return a page of a country-day's ledger. ``planned_names`` are used for cities without a name elsewhere."""
    expected = summary.expected_cities
    path = f"/country-stats/{summary.country}/{summary.date}"
    return Ledger(
        country=summary.country,
        date=summary.date,
        totals=day_detail(summary, country_name=summary.country_name),
        cities=tuple(
            _city(
                city_id,
                summary.ledger.get(city_id),
                manifests.get(city_id),
                expected=city_id in expected,
                planned_name=planned_names.get(city_id, ""),
            )
            for city_id in page.city_ids
        ),
        next=None if page.last else f"{path}?limit={limit}&after={quote(page.city_ids[-1], safe='')}",
    )


def _name_of(entry: LedgerEntry | None, manifest: Manifest | None) -> str:
    return (entry.city_name if entry else "") or (manifest.city_name if manifest else "")


def _city(
    city_id: CityId, entry: LedgerEntry | None, manifest: Manifest | None, *, expected: bool, planned_name: str
) -> LedgerCity:
    counted = entry is not None and entry.contribution is not None
    if counted:
        standing = CityStanding.REPORTED if expected else CityStanding.LEFT
    else:
        standing = CityStanding.MISSING if expected else CityStanding.RETRACTED
    return LedgerCity(
        city_id=city_id,
        city_name=_name_of(entry, manifest) or planned_name,
        standing=standing,
        revision=entry.revision if entry else None,
        contribution=entry.contribution if entry else None,
        trips_on_other_dates=entry.trips_on_other_dates if entry else 0,
        suspicious=(entry.suspicious or None) if entry else None,
        provenance=_provenance(manifest) if manifest else None,
    )


def _provenance(manifest: Manifest) -> Provenance:
    return Provenance(
        revision=manifest.revision,
        country=manifest.country,
        request_id=manifest.request_id,
        upstream_url=manifest.upstream_url,
        raw_key=manifest.raw_key,
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        etag=manifest.etag,
        last_modified=manifest.last_modified,
        ingested_at=manifest.ingested_at,
        bad_records=manifest.bad_records,
        rule_version=manifest.rule_version,
        plan_revision=manifest.plan_revision,
    )
