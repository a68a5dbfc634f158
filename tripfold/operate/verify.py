"""Compares the live summaries, or the compacted topics, with the manifests and plans of the bucket; or the tables."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from prometheus_client import write_to_textfile

from services.aggregate.audit.compare import RAW_OBJECT, Difference
from services.aggregate.audit.verify import verify_dates
from services.aggregate.bucket_reader import Dates
from services.aggregate.tables.verify import verify_tables
from shared.domain.errors import OperatorError
from shared.domain.topics import COMPACTED
from shared.kafka.producer import KafkaPublisher
from shared.runtime import metrics
from tripfold.console import Records, print_remark
from tripfold.operate.command_line import (
    JSON_ITEMS_MAX,
    AsJson,
    FirstDate,
    LastDate,
    StepBars,
    command_settings,
    console,
    date_range,
    open_bucket,
    print_json,
    progress_bar,
    run_command,
    wait_before_comparison,
)
from tripfold.operate.topic_audit import TopicAudit, kafka_topics, print_unread
from tripfold.operate.topic_records import RecordDifference, UnreadRecords


def verify_command(
    first: FirstDate = None,
    last: LastDate = None,
    *,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every raw object again, with an independent parser.")
    ] = False,
    topics: Annotated[
        bool, typer.Option("--topics", help="Compare the compacted topics with the bucket, instead of the summaries.")
    ] = False,
    lake: Annotated[
        bool, typer.Option("--lake", help="Compare the Parquet tables with the summaries, row by row.")
    ] = False,
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Write the result to FILE as metrics, for the textfile collector of Prometheus's node exporter.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recompute every country-day from manifests and plans; exit 1 if a live summary differs.

    --topics compares two records of each key of city-stats and country-day-summaries with the bucket: that of the
    highest revision, and the last one.

    --lake compares each row of the tables with the summary that it shows. Summaries that changed within twice
    TRIPFOLD_TABLES_INTERVAL_S may be newer than the tables: these are counted, and are no difference.

    An object or a record may still be on its way. verify looks again for some seconds before it reports a difference.

    Example: tripfold verify --from 2024-05-01 --to 2024-05-31 --deep

    Example: tripfold verify --topics --metrics-file /var/lib/node_exporter/topics.prom
    """
    if topics and deep:
        raise typer.BadParameter("--topics reads no raw objects: run --deep by itself", param_hint="--deep")
    if lake and (topics or deep):
        raise typer.BadParameter("--lake compares only the tables: run it by itself", param_hint="--lake")
    if metrics_file is not None and not os.access(metrics_file.parent, os.W_OK):
        raise typer.BadParameter(
            f"cannot write into {metrics_file.parent}: make this directory, or name another file",
            param_hint="--metrics-file",
        )
    dates = Dates(*date_range(first, last))
    began_s = time.monotonic()
    if topics:
        verified = _verify_topics(dates, as_json=as_json)
    elif lake:
        verified = _verify_lake(dates, as_json=as_json)
    else:
        verified = _verify_summaries(dates, deep=deep, as_json=as_json)
    if metrics_file is not None:
        check = "topics" if topics else "lake" if lake else "deep" if deep else "summaries"
        _write_metrics(metrics_file, check, verified, duration_s=time.monotonic() - began_s)
    if verified.differences:
        raise typer.Exit(1)


class _Counts(msgspec.Struct, frozen=True, kw_only=True):
    compared: int
    differences: int


def _write_metrics(path: Path, check: str, verified: _Counts, *, duration_s: float) -> None:
    """Write the result to a file that replaces the one of the last run at once."""
    metrics.verify_compared.labels(check).set(verified.compared)
    metrics.verify_differences.labels(check).set(verified.differences)
    metrics.verify_timestamp.labels(check).set_to_current_time()
    metrics.verify_duration.labels(check).set(duration_s)
    try:
        write_to_textfile(str(path), metrics.VERIFY)
    except OSError as error:
        raise OperatorError(f"cannot write the metrics to {path}: {error.strerror}. Name another file") from error


def _verify_summaries(dates: Dates, *, deep: bool, as_json: bool) -> _Counts:
    settings = command_settings()

    async def run() -> tuple[int, int, int, int, list[Difference]]:
        dates_done = country_days = total = raw_expired = 0
        kept: list[Difference] = []
        async with open_bucket(settings) as store:
            with progress_bar("verifying", "dates") as show:
                async for verified in verify_dates(store, dates, deep=deep, wait=wait_before_comparison):
                    dates_done += 1
                    country_days += verified.country_days
                    total += len(verified.differences)
                    raw_expired += verified.raw_expired
                    kept += verified.differences[: JSON_ITEMS_MAX - len(kept)]
                    show(verified.dates_done, verified.dates_total)
        return dates_done, country_days, total, raw_expired, kept

    dates_done, country_days, total, raw_expired, kept = run_command(run())
    if as_json:
        print_json(
            {
                "dates": dates_done,
                "country_days": country_days,
                "differences_total": total,
                "raw_expired": raw_expired,
                "differences": kept,
            }
        )
    elif kept:
        _records_of(kept).print(console)
        print_remark(f"Differences: {total:,}, in {country_days:,} country-days. Repair summaries: 'tripfold repair'.")
        if any(one.what.startswith(RAW_OBJECT) for one in kept):
            print_remark("repair does not restore raw objects. Request these dates again to download them.")
    else:
        print_remark(f"No differences: {country_days:,} country-days match their manifests (dates: {dates_done:,}).")
    if raw_expired and not as_json:
        print_remark(f"{raw_expired:,} raw objects have expired ('tripfold expire raw').")
    return _Counts(compared=country_days, differences=total)


def _verify_lake(dates: Dates, *, as_json: bool) -> _Counts:
    settings = command_settings()
    grace = dt.timedelta(seconds=2 * settings.tables_interval_s)

    async def run() -> tuple[int, int, int, int, list[Difference]]:
        months = rows = behind = total = 0
        kept: list[Difference] = []
        async with open_bucket(settings) as store:
            with progress_bar("verifying", "months") as show:
                async for verified in verify_tables(store, dates, grace=grace):
                    months += 1
                    rows += verified.rows
                    behind += verified.behind
                    total += len(verified.differences)
                    kept += verified.differences[: JSON_ITEMS_MAX - len(kept)]
                    show(verified.months_done, verified.months_total)
        return months, rows, behind, total, kept

    months, rows, behind, total, kept = run_command(run())
    if as_json:
        counts = {"months": months, "rows": rows, "behind": behind}
        print_json({**counts, "differences_total": total, "differences": kept})
        return _Counts(compared=rows, differences=total)
    if kept:
        _records_of(kept).print(console)
        print_remark(
            f"Differences: {total:,}, in {rows:,} rows. Build the tables again: 'tripfold lake build --again'."
        )
    else:
        print_remark(f"No differences: {rows:,} rows match their summaries (months: {months:,}).")
    if behind:
        print_remark(f"{behind:,} country-days changed too recently for the tables to show it.")
    return _Counts(compared=rows, differences=total)


def _records_of(differences: Iterable[Difference]) -> Records:
    records = Records("date", "country", "city", "what", "found", "expected", whole={"date", "country", "city"})
    for one in differences:
        found = f"{one.found} (still in flight)" if one.in_flight else one.found
        records.add(str(one.date), one.country, one.city_id or "", one.what, found, one.expected)
    return records


def _verify_topics(dates: Dates, *, as_json: bool) -> _Counts:
    settings = command_settings()
    keys_of = dict.fromkeys((topic.value for topic in COMPACTED), 0)

    async def run() -> tuple[int, list[RecordDifference], UnreadRecords]:
        total = 0
        kept: list[RecordDifference] = []
        async with open_bucket(settings) as store, KafkaPublisher(settings, source="verify") as publisher:
            await publisher.check()
            with StepBars() as bars:
                audit = TopicAudit(store, kafka_topics(settings), wait=wait_before_comparison, report=bars.report)
                for topic in COMPACTED:
                    async for audited in audit.run(topic, dates):
                        keys_of[topic.value] += audited.keys
                        total += len(audited.differences)
                        kept += audited.differences[: JSON_ITEMS_MAX - len(kept)]
        return total, kept, audit.unread

    total, kept, unread = run_command(run())
    compared = " and ".join(f"{count:,} keys of {topic}" for topic, count in keys_of.items())
    if as_json:
        document = {"keys": keys_of, "differences_total": total, "differences": kept}
        print_json({**document, "skipped_total": unread.total, "skipped": unread.named})
    else:
        print_unread(unread.total, unread.named)
        if kept:
            records = Records("topic", "key", "what", "found", "expected")
            for one in kept:
                records.add(one.topic.value, one.key, one.what, one.found, one.expected)
            records.print(console)
            print_remark(f"Differences: {total:,}, in {compared}. Publish the bucket again: 'tripfold republish'.")
        else:
            print_remark(f"No differences: {compared} match the bucket.")
    return _Counts(compared=sum(keys_of.values()), differences=total)
