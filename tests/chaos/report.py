"""Renders the report of a chaos campaign as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from tests.chaos.campaign import RECOVERY_DEADLINE_S, CampaignReport

COUNTERS = {
    "tripfold_faults_total": "failed calls that were retried with backoff",
    "tripfold_cas_conflicts_total": "compare-and-swap conflicts, with another writer or an earlier attempt",
    "tripfold_commit_failures_total": "failed offset commits, after which Kafka redelivers the batch",
    "tripfold_upstream_resumptions_total": "downloads resumed with a range request",
    "tripfold_upstream_requests_total": "requests to the upstream",
    "tripfold_events_consumed_total": "events consumed",
    "tripfold_events_published_total": "events published",
    "tripfold_dead_letters_total": "records dead-lettered",
}


def markdown_of(report: CampaignReport) -> str:
    """Return the report as Markdown that begins with a second-level heading."""
    ended = ", ".join(f"{count:,} {status}" for status, count in sorted(report.requests_ended.items()))
    lines = [
        f"## {report.seconds:.0f} seconds on {'the embedded broker' if report.broker == 'embedded' else report.broker}",
        "",
        f"Seed {report.seed}, started {report.started_at}. **{len(report.differences)} differences.**",
        "",
        *(f"- {difference}" for difference in report.differences),
        *([""] if report.differences else []),
        *_table(
            ("count", "number"),
            [
                ("faults injected", f"{sum(report.faults.values()):,}"),
                ("requests accepted", f"{report.requests_accepted:,}"),
                ("requests refused with an error", f"{report.requests_refused:,}"),
                ("requests ended", ended),
                ("city-days done", f"{report.city_days_done:,}"),
                ("… of which failed because of upstream faults", f"{report.city_days_failed:,}"),
                ("files corrected", f"{report.corrections:,}"),
                ("cities moved", f"{report.moves:,}"),
                ("checked at the end", _checked(report)),
                ("from the last fault until idle", f"{report.idle_after_s:.1f} s"),
                ("differences", f"{len(report.differences):,}"),
            ],
        ),
        "",
        *_table(
            ("fault", "times"),
            [(name, f"{count:,}") for name, count in sorted(report.faults.items(), key=lambda one: -one[1])],
        ),
        "",
        *_table(
            ("counter of the services", "number"),
            [(text, f"{report.counters.get(name, 0):,}") for name, text in COUNTERS.items()],
        ),
        "",
        *_table(
            (
                "recovery until ready, while other faults continue",
                "times",
                "median",
                "longest",
                f"longer than {RECOVERY_DEADLINE_S:.0f} s",
            ),
            _times(report),
        ),
        "",
    ]
    return "\n".join(lines)


def _checked(report: CampaignReport) -> str:
    days = f"{report.city_days_checked:,} city-days, {report.country_days_checked:,} country-days"
    return f"{days}, {report.trips_checked:,} trips"


def _times(report: CampaignReport) -> Iterable[tuple[str, ...]]:
    timed: Mapping[str, Sequence[float]] = {
        **report.recovery_s,
        "from SIGTERM to exit": report.sigterm_s,
    }
    for event, times_s in sorted(timed.items()):
        if times_s:
            yield (
                event,
                f"{len(times_s)}",
                f"{statistics.median(times_s):.1f} s",
                f"{max(times_s):.1f} s",
                f"{report.recoveries_missed.get(event, 0)}",
            )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
