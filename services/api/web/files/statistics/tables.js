// Tables of the statistics: the totals by country, or the days of one country. A click on a heading sorts the rows.

import { button, element, scrollable } from "../dom.js";
import { byName, change } from "../format.js";
import { dayChange, totalChange } from "./compare.js";
import { MEASURES, measureOf, words } from "./measures.js";
import { completeness } from "./stats.js";

const figuresOf = ({ rate }) =>
  Object.keys(MEASURES).map((key) => {
    const measure = measureOf(key, Boolean(rate));
    return { name: measure.name, of: measure.of, show: (value) => words(measure, value), figure: true };
  });

const changeColumn = (measure, percentOf) => ({
  name: `Change of ${measure.name.toLowerCase()}`,
  of: (row) => percentOf(row) ?? -Infinity,
  show: (percent) => (percent === -Infinity ? "–" : change(percent)),
  figure: true,
});

/** A table with a row for each country. `chosen` has the slugs of countries with a line; `onchoose(slug, on)` changes it. */
export function countriesTable({ state, countries, measure, comparison }, { chosen, linesMax, onchoose, onopen }) {
  const days = ({ complete, provisional, none }) => complete + provisional + none;
  const columns = [
    {
      name: "Country",
      of: (country) => country.name,
      show: (name, country) => button(name, () => onopen(country), { class: "link" }),
      head: true,
    },
    ...figuresOf(state).map((figure) => ({ ...figure, of: (country) => figure.of(country.total) })),
    comparison && changeColumn(measure, (country) => totalChange(comparison, measure, country)),
    {
      name: "Days complete",
      of: (country) => country.total.complete,
      show: (complete, country) =>
        element(
          "span",
          { class: country.total.provisional ? "provisional-text" : null },
          `${complete} of ${days(country.total)}`,
          country.total.provisional ? `, ${country.total.provisional} provisional` : "",
        ),
      figure: true,
    },
    linesMax && {
      name: "Line",
      show: (_, country) =>
        element("input", {
          type: "checkbox",
          "aria-label": `Line of ${country.name}`,
          checked: chosen.has(country.slug),
          disabled: !chosen.has(country.slug) && chosen.size >= linesMax,
          onchange: (event) => onchoose(country.slug, event.target.checked),
        }),
    },
  ].filter(Boolean);
  return sortable("Totals by country", columns, countries);
}

/** A table with a row for each day of one country. `onopen(day)` shows its cities. */
export function daysTable({ state, countries: [country], measure, comparison }, onopen) {
  const columns = [
    { name: "Date", of: (day) => day.date, show: (date, day) => button(date, () => onopen(day), { class: "link" }), head: true },
    ...figuresOf(state).map((figure) => ({
      ...figure,
      show: (value, day) => (day.standing === "none" ? "–" : figure.show(value)),
    })),
    comparison && changeColumn(measure, (day) => dayChange(comparison, measure, country, country.days.indexOf(day))),
    {
      name: "Completeness",
      of: (day) => day.standing,
      show: (_, day) => element("span", { class: `${day.standing}-text` }, completeness(day)),
    },
  ].filter(Boolean);
  return sortable(`Days of ${country.name}`, columns, country.days);
}

const orders = new Map(); // the sort order by caption, kept when the numbers change

function sortable(caption, columns, rows) {
  const body = element("tbody");
  const heads = columns.map((column) =>
    element(
      "th",
      { scope: "col", class: column.figure ? "figure" : null },
      column.of ? button(column.name, () => sort(column)) : column.name,
    ),
  );
  const show = (sorted) =>
    body.replaceChildren(
      ...sorted.map((row) =>
        element(
          "tr",
          {},
          columns.map((column) =>
            element(
              column.head ? "th" : "td",
              { scope: column.head ? "row" : null, class: column.figure ? "figure" : null },
              column.show(column.of?.(row), row),
            ),
          ),
        ),
      ),
    );
  const sort = (column) => {
    const head = heads[columns.indexOf(column)];
    const upwards = head.getAttribute("aria-sort") !== (column.figure ? "descending" : "ascending") ? !column.figure : column.figure;
    orders.set(caption, { name: column.name, upwards });
    arrange(column, upwards);
  };
  const arrange = (column, upwards) => {
    const head = heads[columns.indexOf(column)];
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", upwards ? "ascending" : "descending");
    const compare = (one, other) => (typeof one === "string" ? byName(one, other) : one - other);
    show(rows.toSorted((one, other) => compare(column.of(one), column.of(other)) * (upwards ? 1 : -1)));
  };
  show(rows);
  const order = orders.get(caption);
  const sorted = order && columns.find(({ name }) => name === order.name);
  if (sorted) arrange(sorted, order.upwards);
  return scrollable(
    element("table", { class: "rows" }, element("caption", {}, caption), element("thead", {}, element("tr", {}, heads)), body),
  );
}
