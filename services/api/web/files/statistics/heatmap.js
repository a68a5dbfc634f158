// The map of countries and days: a grid with coloured cells, which screen readers read and arrow keys walk.

import { STATES, classOf as stateClassOf } from "../completeness/states.js";
import { element, hideHint, showHint } from "../dom.js";
import { change, dayOfWeek, isMonday, isWeekend, month, shortChange } from "../format.js";
import { dayChange } from "./compare.js";
import { grid } from "./grid.js";
import { legend } from "./legend.js";
import { unitOf } from "./measures.js";
import { changeClassOf, classOf, ownScaleOf, scaleOf } from "./scale.js";
import { sentence } from "./stats.js";

const NUMBER_WIDTH = 54;
const DAYS_WITH_NUMBERS_MIN = 16;
const DAYS_WITH_COLUMN_HEADINGS_MAX = 62;
const NAMES_WIDTH = 150;
const TARGET_MIN = 24;

/**
 * A map in an element, which `draw(model)` fills. Calls `onopen(country, day)` for the chosen country-day, and
 * `onzoom(day)` for a cell that is too narrow for a finger.
 */
export function heatmap({ onopen, onzoom }) {
  const place = element("div", { class: "map" });
  let shown = null;
  let layout = ""; // the rows and columns of the displayed map

  function draw(model) {
    const { countries, dates, measure } = model;
    const before = layout;
    layout = JSON.stringify([countries.map(({ slug }) => slug), dates]);
    const start = before === layout ? shown?.position() : null; // other rows begin at the top
    const density = densityOf(dates.length, place.clientWidth);
    const look = lookOf(model);
    const dayOf = ({ row, column }) => [countries[row], countries[row].days[column]];
    const spoken = (at) => spokenDay(model, ...dayOf(at), at.column);
    const table = element(
      "table",
      { class: `heatmap ${density}`, role: "grid", "aria-readonly": "true" },
      element("caption", { class: "unseen" }, `${measure.name} by country and day. Arrow keys move, Enter shows the cities.`),
      heads(dates),
    );
    table.style.setProperty("--days", dates.length);
    shown = grid(table, {
      rows: countries.length,
      columns: dates.length,
      start,
      makeRow: (index) => rowOf(countries[index], look),
      onopen(at, event) {
        const [country, day] = dayOf(at);
        const isNarrow = event.pointerType === "touch" && event.target.clientWidth < TARGET_MIN;
        if (isNarrow) onzoom(day);
        else onopen(country, day);
      },
      onfocus(cell, at) {
        const { left, bottom } = cell.getBoundingClientRect();
        cell.setAttribute("aria-label", spoken(at));
        if (cell.matches(":focus-visible")) showHint(spoken(at), left, bottom - 12);
      },
    });
    table.addEventListener("pointermove", (event) => {
      const at = event.pointerType === "mouse" ? shown.placeOf(event.target) : null;
      if (at) showHint(spoken(at), event.clientX, event.clientY);
      else hideHint();
    });
    table.addEventListener("pointerleave", hideHint);
    table.addEventListener("focusout", hideHint);
    place.replaceChildren(shown.frame, legend(model, look));
    shown.show();
  }

  return { place, draw };
}

// Numbers where there is room for them, then squares, then as narrow as needed.
function densityOf(days, width) {
  if (days <= DAYS_WITH_NUMBERS_MIN || (width - NAMES_WIDTH) / days >= NUMBER_WIDTH) return "roomy";
  return days <= DAYS_WITH_COLUMN_HEADINGS_MAX ? "close" : "dense";
}

/** How the cells of a model look: the class and the text of a day, and what the legend explains. */
function lookOf({ state, countries, measure, comparison }) {
  const valuesOf = ({ days }) => days.filter(({ standing }) => standing !== "none").map(measure.of);
  const options = { zeroApart: measure.kind !== "time", kind: measure.kind };
  if (state.map === "change" && comparison) {
    const percent = (country, at) => dayChange(comparison, measure, country, at);
    return {
      kind: "change",
      classOf: (country, day, at) => (percent(country, at) === null ? "unknown" : changeClassOf(percent(country, at))),
      textOf: (country, day, at) => (percent(country, at) === null ? "·" : shortChange(percent(country, at))),
    };
  }
  const all = countries.flatMap(valuesOf);
  const unit = unitOf(measure, all);
  const textOf = (country, day) => unit.show(measure.of(day));
  if (state.colours === "within") {
    const scales = new Map(countries.map((country) => [country, ownScaleOf(valuesOf(country), options)]));
    return { kind: "within", unit, textOf, classOf: (country, day) => classOf(measure.of(day), scales.get(country)) };
  }
  const scale = scaleOf(all, options);
  return { kind: "value", unit, scale, textOf, classOf: (country, day) => classOf(measure.of(day), scale) };
}

function rowOf(country, look) {
  const cellOf = (day, at) => {
    if (day.standing === "none") return emptyCell(day);
    return element(
      "td",
      { class: `${day.standing} ${look.classOf(country, day, at)}` },
      look.textOf(country, day, at),
      day.standing === "provisional" ? element("span", { class: "unseen" }, " provisional") : "",
    );
  };
  return element("tr", {}, element("th", { scope: "row", title: country.name }, country.name), country.days.map(cellOf));
}

// Why the day has no data, as soon as that is known.
function emptyCell({ state }) {
  const letter = state ? element("span", { "aria-hidden": "true" }, STATES[state].letter) : "";
  return element("td", { class: state ? stateClassOf(state) : "none" }, letter, element("span", { class: "unseen" }, state ?? "no data"));
}

function spokenDay({ measure, comparison }, country, day, at) {
  const percent = comparison ? dayChange(comparison, measure, country, at) : null;
  const before = comparison?.bySlug.get(country.slug)?.before[at];
  const compared = percent === null ? "" : `; ${measure.name.toLowerCase()} ${change(percent)} against ${before.date}`;
  return sentence(country, day) + compared;
}

// The months above, then the days; in a long range only the weeks, by their Mondays.
function heads(dates) {
  const weekly = dates.length > DAYS_WITH_COLUMN_HEADINGS_MAX;
  const months = groups(dates, (date) => date.endsWith("-01"));
  const days = groups(dates, weekly ? isMonday : () => true);
  return element(
    "thead",
    {},
    element(
      "tr",
      {},
      element("td", { rowspan: 2 }),
      months.map(({ date, length }) =>
        element("th", { scope: "colgroup", colspan: length }, length > 2 ? `${month(date)} ${date.slice(0, 4)}` : month(date)),
      ),
    ),
    element(
      "tr",
      {},
      days.map(({ date, length }) =>
        element(
          "th",
          {
            scope: weekly ? "colgroup" : "col",
            colspan: length,
            abbr: date,
            class: !weekly && isWeekend(date) ? "weekend" : null,
          },
          element("span", { class: "weekday" }, `${dayOfWeek(date)} `),
          weekly && length < 4 ? "" : String(Number(date.slice(8))),
        ),
      ),
    ),
  );
}

function groups(dates, begins) {
  const found = [];
  for (const date of dates) {
    if (found.length && !begins(date)) found.at(-1).length += 1;
    else found.push({ date, length: 1 });
  }
  return found;
}
