// Tables of the statistics: the totals by country, or the days of one country. A click on a heading sorts the rows.

import { button, element, scrollable } from "../dom.js";
import { count, delay } from "../format.js";
import { completeness } from "./stats.js";

const FIGURES = [
  { name: "Average delay", of: (row) => row.average_delay_s, show: delay },
  { name: "Passengers", of: (row) => row.passenger_count, show: count },
  { name: "Buses", of: (row) => row.bus_count, show: count },
  { name: "Accidents", of: (row) => row.accident_count, show: count },
];

/** A table with a row for each country. `chosen` has the slugs of countries with a line; `onchoose(slug, on)` changes it. */
export function countriesTable(countries, { chosen, linesMax, onchoose, onopen }) {
  const days = ({ complete, provisional, none }) => complete + provisional + none;
  const columns = [
    {
      name: "Country",
      of: (country) => country.name,
      show: (name, country) => button(name, () => onopen(country), { class: "link" }),
      head: true,
    },
    ...FIGURES.map((figure) => ({ ...figure, of: (country) => figure.of(country.total), figure: true })),
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
    {
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
  ];
  return sortable("Totals by country", columns, countries);
}

/** A table with a row for each day of one country. `onopen(day)` shows its cities. */
export function daysTable(country, onopen) {
  const columns = [
    { name: "Date", of: (day) => day.date, show: (date, day) => button(date, () => onopen(day), { class: "link" }), head: true },
    ...FIGURES.map((figure) => ({
      ...figure,
      show: (value, day) => (day.standing === "none" ? "–" : figure.show(value)),
      figure: true,
    })),
    {
      name: "Completeness",
      of: (day) => day.standing,
      show: (_, day) => element("span", { class: `${day.standing}-text` }, completeness(day)),
    },
  ];
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
    const compare = (one, other) => (typeof one === "string" ? one.localeCompare(other, "en") : one - other);
    show([...rows].sort((one, other) => compare(column.of(one), column.of(other)) * (upwards ? 1 : -1)));
  };
  show(rows);
  const order = orders.get(caption);
  if (order) arrange(columns.find(({ name }) => name === order.name), order.upwards);
  return scrollable(
    element("table", { class: "rows" }, element("caption", {}, caption), element("thead", {}, element("tr", {}, heads)), body),
  );
}
