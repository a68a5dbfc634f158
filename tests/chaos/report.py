"""The report of a chaos campaign, and its form in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

RECOVERY_DEADLINE_S = 300.0

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


class CampaignReport(msgspec.Struct, kw_only=True):
    """The events and the results of a campaign; ``differences`` must be empty.

    ``recoveries_missed`` counts faults after which a service was not ready within RECOVERY_DEADLINE_S, while other
    faults continued.
    """

    seconds: float
    seed: int
    broker: str
    started_at: str
    faults: dict[str, int] = {}
    outage_s: dict[str, float] = {}
    requests_accepted: int = 0
    requests_joined: int = 0
    requests_refused: int = 0
    requests_ended: dict[str, int] = {}
    backfills_ended: int = 0
    schedule_runs: int = 0
    city_days_done: int = 0
    city_days_failed: int = 0
    corrections: int = 0
    moves: int = 0
    city_days_checked: int = 0
    country_days_checked: int = 0
    trips_checked: int = 0
    counters: dict[str, int] = {}
    sigterm_s: list[float] = []
    recovery_s: dict[str, list[float]] = {}
    recoveries_missed: dict[str, int] = {}
    idle_after_s: float = 0.0
    differences: list[str] = []


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
                ("requests and backfills accepted", f"{report.requests_accepted:,}"),
                ("… of which joined a waiting request of their date", f"{report.requests_joined:,}"),
                ("requests refused with an error", f"{report.requests_refused:,}"),
                ("requests ended", ended),
                ("backfills ended", f"{report.backfills_ended:,}, {report.schedule_runs:,} of them of the schedule"),
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
                "p50",
                "p90",
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
                *(f"{percentile(times_s, percent):.1f} s" for percent in (50, 90, 100)),
                f"{report.recoveries_missed.get(event, 0)}",
            )


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the least of the values that is not below ``percent`` of them (the nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
