// The countries of a single day as bars, ranked.

import { button, element, scrollable } from "../dom.js";
import { change } from "../format.js";
import { dayChange, hasData } from "./compare.js";
import { words } from "./measures.js";
import { completeness } from "./stats.js";

/** Create the bars of a model with one day. `onopen(country, day)` shows its cities. */
export function bars({ countries, dates, measure, comparison }, onopen) {
  const values = countries.map(({ days: [day] }) => (hasData(day) ? measure.of(day) : 0));
  const low = Math.min(0, ...values);
  const span = Math.max(0, ...values) - low || 1;
  const rows = countries.map((country) => rowOf(country, { low, span, measure, comparison, onopen }));
  return scrollable(
    element(
      "table",
      { class: "rows bars" },
      element("caption", {}, `${measure.name} on ${dates[0]}. A country leads to its cities.`),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          element("th", { scope: "col" }, "Country"),
          element("th", { scope: "col" }, element("span", { class: "unseen" }, "Bar")),
          element("th", { scope: "col", class: "figure" }, measure.name),
          comparison ? element("th", { scope: "col", class: "figure" }, "Change") : null,
        ),
      ),
      element("tbody", {}, rows),
    ),
  );
}

function rowOf(country, { low, span, measure, comparison, onopen }) {
  const [day] = country.days;
  const percent = comparison ? dayChange(comparison, measure, country, 0) : null;
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, button(country.name, () => onopen(country, day), { class: "link" })),
    element("td", { class: "bar" }, hasData(day) ? barOf(measure.of(day), day.standing, low, span) : ""),
    element(
      "td",
      { class: "figure" },
      hasData(day) ? words(measure, measure.of(day)) : completeness(day),
      day.standing === "provisional" ? element("small", { class: "provisional-text" }, " provisional") : "",
    ),
    comparison ? element("td", { class: "figure" }, percent === null ? "–" : change(percent)) : null,
  );
}

function barOf(value, standing, low, span) {
  const bar = element("i", { class: standing });
  bar.style.marginLeft = `${((Math.min(0, value) - low) / span) * 100}%`;
  bar.style.width = `${(Math.abs(value) / span) * 100}%`;
  return bar;
}
