"""The modules of the statistics that have no DOM, evaluated in a browser."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar import Litestar
from playwright.sync_api import BrowserContext

Rules = Callable[..., Any]

EXAMPLES = settings(max_examples=25)
VALUES = st.lists(st.integers(min_value=0, max_value=10**9), min_size=1, max_size=60)
DELAYS = st.lists(st.integers(min_value=-3_600, max_value=36_000), min_size=1, max_size=60)


@pytest.fixture(name="rules", scope="module")
def _rules(context: BrowserContext, api: tuple[Litestar, str]) -> Iterator[Rules]:
    """Yield a function that calls a function of modules: its source gets the exports of all modules, and arguments."""
    _, address = api
    page = context.new_page()
    page.goto(f"{address}/page/main.js")
    page.evaluate("""async () => {
      const names = ["format.js", ...["measures", "scale", "compare", "deviation", "rows", "csv", "state", "stats"]
        .map((name) => `statistics/${name}.js`)];
      window.rules = Object.assign({}, ...await Promise.all(names.map((name) => import(`/page/${name}`))));
    }""")

    def call(source: str, *args: object) -> Any:  # whatever the function of the page returns
        return page.evaluate(f"(args) => {{ with (window.rules) return ({source})(...args) }}", list(args))

    yield call
    page.close()


@EXAMPLES
@given(values=VALUES)
def test_a_scale_of_counts_keeps_their_order(rules: Rules, values: list[int]) -> None:
    """A greater count never has a lower colour; zero has its own class; there are at most seven colours."""
    classes, steps = rules(
        "(values) => { const scale = scaleOf(values, {zeroApart: true});"
        " return [values.map((value) => classOf(value, scale)), scale.steps] }",
        sorted(values),
    )
    ranks = ["zero", "low", *(f"c{step}" for step in range(7)), "high"]
    places = [ranks.index(name) for name in classes]
    assert places == sorted(places)
    assert [name == "zero" for name in classes] == [value == 0 for value in sorted(values)]
    assert len(steps) <= 6
    assert steps == sorted(set(steps))


@EXAMPLES
@given(values=DELAYS)
def test_a_scale_of_delays_is_even_and_round(rules: Rules, values: list[int]) -> None:
    """The limits between the colours have equal distances, and most values are between the outliers."""
    scale = rules("(values) => scaleOf(values, {kind: 'time'})", values)
    distances = {round(later - earlier, 6) for earlier, later in zip(scale["steps"], scale["steps"][1:], strict=False)}
    assert len(distances) <= 1
    assert len(scale["steps"]) <= 6
    assert sum(scale["low"] <= value <= scale["high"] for value in values) >= len(values) / 2


def test_one_outlier_does_not_coarsen_the_scale(rules: Rules) -> None:
    """A delay of 18 minutes among ordinary ones of 5 to 6 minutes has its own colour, and the limits stay fine."""
    usual = [300 + 3 * number for number in range(20)]
    source = "(values) => { const scale = scaleOf(values, {kind: 'time'}); return [scale.steps, classOf(1080, scale)] }"
    assert rules(source, usual) == rules(source, [*usual, 1080]) == [[310, 320, 330, 340, 350], "high"]


def test_a_map_has_one_unit(rules: Rules) -> None:
    """Seconds, minutes, thousands and millions are chosen for all values of a map, by the typical one."""
    show = "(kind, values) => { const unit = unitOf({kind}, values); return [unit.name, ...values.map(unit.show)] }"
    assert rules(show, "time", [5, 61.34, 672.5]) == ["s", "5", "61", "673"]
    assert rules(show, "time", [-130, 400, 1080]) == ["min", "−2.2", "6.7", "18.0"]
    assert rules(show, "count", [0, 7, 9_999]) == ["", "0", "7", "9,999"]
    assert rules(show, "count", [900, 40_000, 1_234_567]) == ["thousands", "0.9", "40.0", "1,234.6"]
    assert rules(show, "rate", [0.25, 3.125]) == ["", "0.25", "3.13"]


def test_names_and_numbers_sort_as_people_do(rules: Rules) -> None:
    """Numbers in names sort by their value."""
    names = ["City 1", "City 2", "City 11"]
    assert rules("(names) => names.toSorted(byName)", sorted(names, reverse=True)) == names


def test_a_change_needs_an_earlier_value(rules: Rules) -> None:
    """A change is a percentage of an earlier value above zero, and is written with its sign."""
    assert rules("changeOf", 15, 10) == 50
    assert rules("changeOf", 0, 0) == 0
    assert rules("changeOf", 3, 0) is None
    assert rules("changeOf", 3, -5) is None
    written = {0.04: "0 %", 3.26: "+3.3 %", -12.4: "−12 %", 1234.5: "+1,235 %"}
    assert {percent: rules("change", percent) for percent in written} == written
    assert [rules("changeClassOf", percent) for percent in (-60, 0, 100)] == ["d0", "d3", "d6"]


def test_ranges_are_compared_day_by_day(rules: Rules) -> None:
    """A period is moved by its length, weekdays by whole weeks; a day without data on one side does not count."""
    shifts = {("", 3): 0, ("previous", 3): 3, ("weekday", 3): 7, ("weekday", 365): 364}
    assert {case: rules("shiftOf", *case) for case in shifts} == shifts
    compared = rules(
        """(days) => {
          const [before, now] = [days.slice(0, 2), days.slice(2)];
          const {bySlug, pairs} = compare([{slug: "japan", days: now}], new Map([["japan", before]]), 2);
          return [bySlug.get("japan").before.map((day) => day?.bus_count), pairs];
        }""",
        [day(10), day(20, standing="none"), day(15), day(30)],
    )
    assert compared == [[10, 20], 1]


def day(trips: int, *, delay_s: float = 60, standing: str = "complete") -> dict[str, object]:
    """Return a day as the page holds it."""
    return {
        "bus_count": trips,
        "passenger_count": 30 * trips,
        "accident_count": 0,
        "average_delay_s": delay_s,
        "delay_total_ms": 1000 * delay_s * trips,
        "standing": standing,
    }


@EXAMPLES
@given(
    before=st.lists(st.integers(min_value=100, max_value=10_000), min_size=8, max_size=8), trips=st.integers(1, 99_999)
)
def test_a_deviation_is_measured_from_the_median_of_the_weekday(rules: Rules, before: list[int], trips: int) -> None:
    """The usual value is the median of the same weekday in the weeks before; a provisional day is never unusual."""
    days = [day(before[number // 7] if number % 7 == 0 else 500) for number in range(56)]
    source = "(days) => deviations(days, {of: (day) => day.bus_count, noise: Math.sqrt}).at(-1)"
    found = rules(source, [*days, day(trips)])
    usual = statistics.median(before)
    if found is None:
        assert abs(trips - usual) < 4 * max(0.05 * usual, usual**0.5, 1.4826 * (max(before) - min(before)))
    else:
        assert found["usual"] == usual
        assert abs(trips - usual) >= 4 * 0.05 * usual
    assert rules(source, [*days, day(trips, standing="provisional")]) is None


def test_unusual_days_are_put_into_words(rules: Rules) -> None:
    """Runs of days are one line; a factor, a percentage or the plain values say how far they are from the usual."""
    words = """(measure, value, usual) =>
      deviationInWords({watched: WATCHED.find((one) => one.measure === measure), value, usual})"""
    assert rules(words, "delay", 210, 60) == "3.5 times its usual delay"
    assert rules(words, "delay", 45, 60) == "25 % less delay than usual"
    assert rules(words, "delay", 45, -3) == "a delay of 45.0 s"
    assert rules(words, "departures", 300, 400) == "25 % fewer departures than usual"
    assert rules(words, "accidents", 9, 3) == "3.0 times as many accidents as usual"
    assert rules(words, "accidents", 9, 0) == "9 accidents"


def test_csv_needs_no_trust_in_names(rules: Rules) -> None:
    """Separators are quoted, and a name that a spreadsheet would run as a formula is text. Numbers stay numbers."""
    source = "(name, day) => csvOf([{name, slug: 'x', days: [day]}], MEASURES.delay, null).split('\\r\\n')[1]"
    today = {**day(4), "date": "2024-05-01"}
    assert rules(source, 'a "b", c', today) == '"a ""b"", c",x,2024-05-01,complete,4,120,0,60'
    for begin in "=+-@\t\uff1d\uff0b\uff0d\uff20":
        assert rules(source, f"{begin}1", today).startswith(f"'{begin}1,x,")
    for begin in "\r\n":
        assert rules(source.replace(".split('\\r\\n')[1]", ""), f"{begin}1", today).count(f'"\'{begin}1"') == 1
    early = {**today, "average_delay_s": -60}
    assert rules(source, "x", early) == "x,x,2024-05-01,complete,4,120,0,-60"
    compared = """(day, before) => { const countries = [{name: 'x', slug: 'x', days: [day]}];
      return csvOf(countries, MEASURES.departures, compare(countries, new Map([['x', [before]]]), 1)); }"""
    assert rules(compared, today, {**day(8), "date": "2024-04-30"}).endswith(",2024-04-30,8,-50\r\n")


def test_the_state_is_in_the_url_without_defaults(rules: Rules) -> None:
    """A state survives its URL, defaults are left out, and an unknown choice is the default."""
    source = "(params) => paramsOf(stateOf(params))"
    state = {"from": "2024-05-01", "to": "2024-05-31", "measure": "accidents", "rate": "1000", "compare": "weekday"}
    assert rules(source, {**state, "map": "change", "find": "a b"}) == {
        **state,
        "country": "",
        "map": "change",
        "find": "a b",
    }
    assert rules(source, {"measure": "constructor", "sort": "x"}) == {"from": "", "to": "", "country": "", "find": ""}
