"""The report of a chaos as a page for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from tests.chaos.campaign import RECOVERY_DEADLINE_S, Report

COUNTERS = {
    "tripfold_faults_total": "tries that were waited out and made again",
    "tripfold_cas_conflicts_total": "compare-and-swaps that another writer, or an earlier try, had won",
    "tripfold_commit_failures_total": "commits that failed, so that a batch came again",
    "tripfold_upstream_resumptions_total": "downloads that went on where they broke",
    "tripfold_upstream_requests_total": "requests to the upstream",
    "tripfold_events_consumed_total": "events consumed",
    "tripfold_events_published_total": "events published",
    "tripfold_dead_letters_total": "records dead-lettered",
}


def markdown_of(report: Report) -> str:
    """Write the report as Markdown, from a heading of the second level on."""
    ended = ", ".join(f"{count:,} {status}" for status, count in sorted(report.requests_ended.items()))
    lines = [
        f"## {report.seconds:.0f} seconds on {'the embedded broker' if report.broker == 'embedded' else report.broker}",
        "",
        f"Seed {report.seed}, begun {report.began_at}. **{len(report.differences)} differences.**",
        "",
        *(f"- {difference}" for difference in report.differences),
        *([""] if report.differences else []),
        *_table(
            ("what", "number"),
            [
                ("faults injected", f"{sum(report.faults.values()):,}"),
                ("requests accepted", f"{report.requests_accepted:,}"),
                ("requests refused with an error, to be made again", f"{report.requests_refused:,}"),
                ("requests ended", ended),
                ("city-days done for them", f"{report.city_days_done:,}"),
                ("… of which the upstream's mischief made fail", f"{report.city_days_failed:,}"),
                ("files corrected", f"{report.corrections:,}"),
                ("cities moved", f"{report.moves:,}"),
                (
                    "judged at the end",
                    _judged(report),
                ),
                ("from the last fault to rest", f"{report.rest_s:.1f} s"),
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
            ("counted by the services", "number"),
            [(text, f"{report.counters.get(name, 0):,}") for name, text in COUNTERS.items()],
        ),
        "",
        *_table(
            (
                "until ready again, while other faults went on",
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


def _judged(report: Report) -> str:
    days = f"{report.city_days_judged:,} city-days, {report.country_days_judged:,} country-days"
    return f"{days}, {report.trips_judged:,} trips"


def _times(report: Report) -> Iterable[tuple[str, ...]]:
    timed: Mapping[str, Sequence[float]] = {
        **report.recovery_s,
        "from SIGTERM to the end of the process": report.sigterm_s,
    }
    for what, times_s in sorted(timed.items()):
        if times_s:
            yield (
                what,
                f"{len(times_s)}",
                f"{statistics.median(times_s):.1f} s",
                f"{max(times_s):.1f} s",
                f"{report.given_up.get(what, 0)}",
            )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
