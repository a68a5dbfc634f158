"""Statistics as tables with sparklines. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from tripfold_client import CountryDay

SPARKLINE_WIDTH_MAX = 31
SPARKLINE_WIDTHS = (SPARKLINE_WIDTH_MAX, 20, 12, 0)  # the first that fits the terminal is used; 0: no sparkline
WIDTH_MAX = 1_000
BARS = "▁▂▃▄▅▆▇█"
NO_DATA = "·"


DaysByCountry = Mapping[str, Sequence[CountryDay]]
"""The days of each country, by its slug."""


def sparkline(values: Sequence[float | None], *, width: int = SPARKLINE_WIDTH_MAX) -> str:
    """Draw values as bars between their minimum and maximum; None is a day without data.

    Each bar shows the mean of several values if there are more than ``width``.
    """
    columns = _columns(values, width) if len(values) > width else list(values)
    known = [value for value in columns if value is not None]
    if not known:
        return NO_DATA * len(columns)
    least, span = min(known), max(known) - min(known)
    return "".join(
        NO_DATA if value is None else BARS[round((value - least) / span * (len(BARS) - 1)) if span else 0]
        for value in columns
    )


def _columns(values: Sequence[float | None], width: int) -> list[float | None]:
    columns: list[float | None] = []
    for column in range(width):
        begin, end = column * len(values) // width, (column + 1) * len(values) // width
        known = [value for value in values[begin:end] if value is not None]
        columns.append(sum(known) / len(known) if known else None)
    return columns


def print_statistics(countries: DaysByCountry, console: Console) -> None:
    """Print a line for each country, with the longest sparklines that fit.

    Numbers are never cut: the terminal wraps a line that is still too long.
    """
    for width in SPARKLINE_WIDTHS:
        table = table_of(countries, width=width)
        if width_of(table, console) <= console.width:
            break
    print_whole(table, console)


def print_whole(table: Table, console: Console) -> None:
    """Print a table at its full width; the terminal wraps it if needed. A pipe gets lines with tabs between fields."""
    if not console.is_terminal:
        for row in zip(*(column.cells for column in table.columns), strict=True):
            console.file.write("\t".join(map(str, row)) + "\n")
        return
    console.width = max(console.width, width_of(table, console))
    console.print(table, highlight=False)


def width_of(table: Table, console: Console) -> int:
    """Return the full width of a table, in columns."""
    return Measurement.get(console, console.options.update(max_width=WIDTH_MAX), table).maximum


def table_of(countries: DaysByCountry, *, width: int = SPARKLINE_WIDTH_MAX) -> Table:
    """Return a line for each country: its totals over the range, and a sparkline of its days.

    ``width`` is the width of a sparkline; 0: none.
    """
    by_day = [f"{what}by day" if width else None for what in (("delay ", "passengers ") if width > 16 else ("", ""))]
    table = _table("country", by_day[0], "delay (s)", by_day[1], "passengers", "departures", "accidents", "days")
    for country, days in countries.items():
        known = [day for day in days if day.known]
        departures = sum(day.bus_count for day in known)
        delay_s = sum(day.delay_total_ms for day in known) / departures / 1000 if departures else 0.0
        delays_s = [day.average_delay_s if day.known else None for day in days]
        carried = [float(day.passenger_count) if day.known else None for day in days]
        table.add_row(
            country,
            *([sparkline(delays_s, width=width)] if width else []),
            f"{delay_s:,.3f}",
            *([sparkline(carried, width=width)] if width else []),
            f"{sum(day.passenger_count for day in known):,}",
            f"{departures:,}",
            f"{sum(day.accident_count for day in known):,}",
            _days(known, len(days)),
        )
    return table


def table_of_days(days: Sequence[CountryDay]) -> Table:
    """Return a line for each day of one country."""
    table = _table("date", "departures", "passengers", "accidents", "delay (s)", "", "cities")
    bars = sparkline([day.average_delay_s if day.known else None for day in days], width=len(days))
    for day, bar in zip(days, bars, strict=True):
        if not day.known:
            table.add_row(str(day.date), "", "", "", "", NO_DATA, _reason_unknown(day))
            continue
        table.add_row(
            str(day.date),
            f"{day.bus_count:,}",
            f"{day.passenger_count:,}",
            f"{day.accident_count:,}",
            f"{day.average_delay_s:,.3f}",
            bar,
            f"{day.cities_reported}/{day.cities_expected}{'' if day.complete else ' provisional'}",
        )
    return table


def _table(*headings: str | None) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, heading in enumerate(heading for heading in headings if heading is not None):
        text = place == 0 or "by day" in heading or heading in {"", "cities", "days"}
        table.add_column(heading, justify="left" if text else "right", no_wrap=True)
    return table


def _reason_unknown(day: CountryDay) -> str:
    if day.unreadable:
        return "unreadable"
    return f"0/{day.cities_expected} provisional" if day.cities_expected else "no data"


def _days(known: Sequence[CountryDay], days: int) -> str:
    provisional = sum(not day.complete for day in known)
    return f"{len(known)}/{days}" + (f", {provisional} provisional" if provisional else "")
