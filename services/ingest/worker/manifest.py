"""Computes the next revision of a city-day from the previous manifest and the fetched file. Pure."""

from __future__ import annotations

import datetime as dt

import msgspec

from services.ingest.parsing.parser import FileTotals
from services.ingest.parsing.trips import rule_version
from services.ingest.upstream.port import Validators
from services.ingest.worker.streaming import StreamedFile
from shared.domain.events import IngestCity
from shared.domain.file_rules import FileRules
from shared.domain.ids import CountrySlug, RequestId
from shared.domain.objects import HISTORY_LENGTH_MAX, Manifest, PastRevision, Plan
from shared.storage.bucket_epoch import next_revision


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """The country of a city-day, and the plan revision that assigns it."""

    country: CountrySlug
    country_name: str
    plan_revision: int


class NewFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was streamed: its totals, its URL and its raw key."""

    raw_key: str
    url: str
    validators: Validators
    streamed: StreamedFile
    replaces_lost: bool = False


def validators_of(manifest: Manifest | None, url: str, rules: FileRules) -> Validators | None:
    """Return the validators for a conditional GET, or None if the file must be downloaded again.

    Validators are valid only at the URL that sent them, and only if the present rules give the file the same totals.
    """
    if manifest is None or manifest.upstream_url != url or not gives_same_totals(manifest, rules):
        return None
    if manifest.etag is None and manifest.last_modified is None:
        return None
    return Validators(etag=manifest.etag, last_modified=manifest.last_modified)


def gives_same_totals(manifest: Manifest, rules: FileRules) -> bool:
    """Tell whether the rules give the stored file the totals that its manifest has.

    If not, the same bytes are parsed again. The rules on bad records matter only for a file that has some.
    """
    if manifest.rule_version != rule_version() or manifest.records_form != str(rules.form):
        return False
    concerned = manifest.bad_records if manifest.other_dates_are_bad else manifest.trips_on_other_dates
    if concerned and manifest.other_dates_are_bad != rules.other_dates_are_bad:
        return False
    records = manifest.contribution.trips + manifest.bad_records
    return rules.bad_records_max.allows(manifest.bad_records, records=records)


def next_manifest(
    previous: Manifest | None,
    task: IngestCity,
    place: Place,
    file: NewFile | None,
    *,
    rules: FileRules,
    attempt: str,
    now: dt.datetime,
    revision_floor: int,
) -> Manifest | None:
    """Return the revision that follows ``previous``, or None if nothing changed.

    ``file`` is None if the upstream responds that the stored file is current. Unchanged means equal bytes, equal names
    and equal parsing rules. A move or a new name alone makes a revision with the same raw object. So does a file that
    ``replaces_lost`` bytes, with a new raw object.
    """
    if previous is not None and is_unchanged(previous, task, place, file, rules):
        return None
    successor = _successor_of(previous, task, place, revision_floor)
    if previous is not None and (file is None or _is_same_file(previous, file, rules)):
        return msgspec.structs.replace(
            previous,
            country=place.country,
            country_name=place.country_name,
            revision=successor.revision,
            plan_revision=successor.plan_revision,
            retracted=successor.retracted,
            history=successor.history,
            attempt=attempt,
            request_id=task.request_id,
            city_name=task.city_name,
            ingested_at=now,
        )
    assert file is not None, "only a stored file can be unchanged"
    return Manifest(
        date=task.date,
        city_id=task.city_id,
        city_name=task.city_name,
        contribution=file.streamed.totals.contribution,
        trips_on_other_dates=file.streamed.totals.trips_on_other_dates,
        attempt=attempt,
        raw_key=file.raw_key,
        sha256=file.streamed.sha256,
        size_bytes=file.streamed.size_bytes,
        upstream_url=file.url,
        etag=file.validators.etag,
        last_modified=file.validators.last_modified,
        request_id=task.request_id,
        rule_version=file.streamed.totals.rule_version,
        records_form=str(rules.form),
        bad_records=file.streamed.totals.bad_records,
        other_dates_are_bad=rules.other_dates_are_bad,
        ingested_at=now,
        country=place.country,
        country_name=place.country_name,
        revision=successor.revision,
        plan_revision=successor.plan_revision,
        retracted=successor.retracted,
        history=successor.history,
        raw_expired_before=previous.raw_expired_before if previous else None,
    )


def is_unchanged(previous: Manifest, task: IngestCity, place: Place, file: NewFile | None, rules: FileRules) -> bool:
    """Tell whether no revision follows ``previous``. ``next_manifest`` describes the arguments."""
    renamed = previous.city_name != task.city_name and task.plan_revision >= previous.plan_revision
    same_file = file is None or _is_same_file(previous, file, rules)
    return same_file and previous.country == place.country and not renamed


def reprocessed(
    previous: Manifest,
    totals: FileTotals,
    *,
    request_id: RequestId,
    rules: FileRules,
    attempt: str,
    now: dt.datetime,
    revision_floor: int,
) -> Manifest | None:
    """Return the revision after its stored file was parsed again, or None if its content is the same."""
    following = msgspec.structs.replace(
        previous,
        contribution=totals.contribution,
        trips_on_other_dates=totals.trips_on_other_dates,
        rule_version=totals.rule_version,
        records_form=str(rules.form),
        bad_records=totals.bad_records,
        other_dates_are_bad=rules.other_dates_are_bad,
    )
    if following == previous:
        return None
    return msgspec.structs.replace(
        following,
        revision=next_revision(previous.revision, revision_floor),
        history=_history_after(previous),
        attempt=attempt,
        request_id=request_id,
        ingested_at=now,
    )


def reissued(previous: Manifest, *, attempt: str, revision_floor: int) -> Manifest:
    """Return a new revision with the content and the retractions of ``previous``."""
    revision = next_revision(previous.revision, revision_floor)
    return msgspec.structs.replace(
        previous,
        revision=revision,
        retracted=dict.fromkeys(previous.retracted, revision),
        history=_history_after(previous),
        attempt=attempt,
    )


def reissued_plan(previous: Plan, *, revision_floor: int) -> Plan:
    """Return a new revision of a plan with the content of ``previous``."""
    return msgspec.structs.replace(previous, revision=next_revision(previous.revision, revision_floor))


def _is_same_file(previous: Manifest, file: NewFile, rules: FileRules) -> bool:
    same_bytes = not file.replaces_lost and previous.sha256 == file.streamed.sha256
    return same_bytes and gives_same_totals(previous, rules)


class _Successor(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a revision that follow from the previous one."""

    revision: int
    plan_revision: int
    retracted: dict[CountrySlug, int]
    history: tuple[PastRevision, ...]


def _successor_of(previous: Manifest | None, task: IngestCity, place: Place, revision_floor: int) -> _Successor:
    revision = next_revision(previous.revision if previous else None, revision_floor)
    plan_revision = max(place.plan_revision, task.plan_revision)
    if previous is None:
        return _Successor(revision=revision, plan_revision=plan_revision, retracted={}, history=())
    left = {previous.country: revision} if previous.country != place.country else {}
    retracted = {country: at for country, at in (previous.retracted | left).items() if country != place.country}
    return _Successor(
        revision=revision,
        plan_revision=max(plan_revision, previous.plan_revision),
        retracted=dict(sorted(retracted.items())),
        history=_history_after(previous),
    )


def _history_after(previous: Manifest) -> tuple[PastRevision, ...]:
    past = PastRevision(
        revision=previous.revision,
        attempt=previous.attempt,
        raw_key=previous.raw_key,
        country=previous.country,
        request_id=previous.request_id,
        ingested_at=previous.ingested_at,
    )
    return (past, *previous.history)[:HISTORY_LENGTH_MAX]
