// The results of the statistics: from the tiles to the tables. Draws what changed, and keeps the rest.

import { element, hideHint, notice } from "../dom.js";
import { urlOf } from "../views.js";
import { bars } from "./bars.js";
import { downloads } from "./downloads.js";
import { heatmap } from "./heatmap.js";
import { LINES_MAX, lines } from "./lines.js";
import { measureOf } from "./measures.js";
import { options } from "./options.js";
import { foundIn, inOrder } from "./rows.js";
import { countriesTable, daysTable } from "./tables.js";
import { tiles } from "./tiles.js";

const LINES_AT_FIRST = 5;

// Its code is loaded when a day is opened first.
const openCountryDay = async (country, day) => (await import("./country_day.js")).openCountryDay(country, day);

/**
 * The results in an element. `draw(state, stats, compared)` draws everything; `compared` has the comparison and its dates,
 * or is null. `onchange(changes)` gets changes of the state.
 */
export function results(place, { onchange }) {
  const part = () => element("div");
  const parts = { tiles: part(), options: part(), map: part(), unusual: part(), lines: part(), table: part() };
  const map = heatmap({
    onopen: openCountryDay,
    onzoom: ({ date }) => onchange({ from: `${date.slice(0, 7)}-01`, to: endOfMonth(date) }),
  });
  let chosen = null; // the slugs of the countries with a line; null: the largest countries
  let model = null;
  let all = null; // the countries of the range, also those that are not found

  function draw(state, stats, compared) {
    hideHint();
    if (stats.countries.length === 0) {
      place.replaceChildren(nothing(state));
      return;
    }
    const isSingleDay = stats.dates.length === 1;
    model = modelOf(state, stats, compared);
    all = stats.countries;
    chooseLines();
    parts.tiles.replaceChildren(tiles({ ...model, countries: all }));
    if (!parts.options.contains(document.activeElement)) parts.options.replaceChildren(options(state, { isSingleDay, onchange }));
    parts.lines.hidden = isSingleDay;
    if (!place.contains(parts.map)) place.replaceChildren(...layout(parts, downloads(() => model)));
    drawRows();
    drawLines();
  }

  function drawRows() {
    const { state, countries, dates } = model;
    if (countries.length === 0) {
      parts.map.replaceChildren(notice("empty", `No country is called “${state.find}”`, "Search for a part of its name."));
    } else if (dates.length === 1) parts.map.replaceChildren(bars(model, openCountryDay));
    else {
      if (!parts.map.contains(map.place)) parts.map.replaceChildren(map.place);
      map.draw(model);
    }
    parts.table.replaceChildren(
      state.country
        ? daysTable(model, (day) => openCountryDay(countries[0], day))
        : countriesTable(model, {
            chosen,
            linesMax: dates.length > 1 ? LINES_MAX : 0,
            onchoose: chooseLine,
            onopen: ({ slug }) => onchange({ country: slug, find: "" }),
          }),
    );
  }

  function drawLines() {
    if (model.dates.length === 1) return;
    const some = all.filter(({ slug }) => chosen.has(slug));
    parts.lines.replaceChildren(
      element("h3", {}, "Day by day"),
      some.length ? lines(some, model.dates, model.measure) : notice("empty", "No country is selected", "Select countries in the table below."),
    );
  }

  function chooseLine(slug, on) {
    chosen[on ? "add" : "delete"](slug);
    drawLines();
    for (const box of parts.table.querySelectorAll("input")) box.disabled = !box.checked && chosen.size >= LINES_MAX;
  }

  function chooseLines() {
    const there = new Set(all.map(({ slug }) => slug));
    chosen = new Set([...(chosen ?? [])].filter((slug) => there.has(slug)));
    if (chosen.size) return;
    const largest = all.toSorted((one, other) => other.total.bus_count - one.total.bus_count);
    chosen = new Set(largest.slice(0, LINES_AT_FIRST).map(({ slug }) => slug));
  }

  return { draw, unusual: parts.unusual };
}

/** What is drawn: the chosen countries in order, with their measure and comparison. */
function modelOf(state, { countries, dates, total }, compared) {
  const measure = measureOf(state.measure, Boolean(state.rate));
  const comparison = compared?.comparison ?? null;
  const order = state.sort || (dates.length === 1 ? "value" : "name");
  const found = inOrder(state.country ? countries : foundIn(countries, state.find), order, measure, comparison);
  return { state, dates, total, measure, comparison, comparedDates: compared?.dates, countries: found };
}

function layout(parts, below) {
  return [
    parts.tiles,
    element("h3", {}, "By country and day"),
    parts.options,
    parts.map,
    element("h3", {}, "What is unusual"),
    parts.unusual,
    parts.lines,
    element("h3", {}, "In numbers"),
    parts.table,
    below,
  ];
}

function nothing({ from, to, country }) {
  return notice(
    "empty",
    "No data in this range",
    country
      ? "This country has no data on these days. Choose another country, or process the days."
      : "These days have not been processed yet. Process them to see results here.",
    element("a", { class: "button", href: urlOf("/jobs", { from, to }) }, "Process these days"),
  );
}

function endOfMonth(date) {
  const [year, month] = date.split("-").map(Number);
  return new Date(Date.UTC(year, month, 0)).toISOString().slice(0, 10);
}
