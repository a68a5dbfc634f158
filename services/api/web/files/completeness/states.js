// The states of days: their names, letters and order, and what a selection of days needs. Pure.

import { count, days as daysInWords, plural } from "../format.js";

/** Each state of the API: the letter of its cells, and its explanation in the legend. */
export const STATES = {
  complete: { letter: "✓", text: "every city is counted" },
  provisional: { letter: "P", text: "cities are missing" },
  running: { letter: "…", text: "is being processed" },
  late: { letter: "L", text: "incomplete after its deadline" },
  refused: { letter: "R", text: "files break a rule" },
  failed: { letter: "F", text: "cities could not be fetched" },
  cancelled: { letter: "C", text: "its request was cancelled" },
  unreadable: { letter: "!", text: "the stored day cannot be read" },
  "not requested": { letter: "", text: "nobody has requested it" },
  "not expected": { letter: "", text: "no city of this country" },
};

/** The class of a state's cells. */
export const classOf = (state) => `s-${state.replaceAll(" ", "-")}`;

/** A day in one sentence. */
export function sentence(name, day) {
  const cities = day.cities_expected ? `, ${count(day.cities_reported ?? 0)} of ${plural(day.cities_expected, "city", "cities")}` : "";
  return `${name}, ${day.date}: ${day.state}${cities}${day.reason ? `. ${day.reason}` : ""}`;
}

/** The rows of a grid: all countries together, then each country. */
export const rowsOf = (grid) => [{ name: "All", country: null, days: grid.dates }, ...grid.countries];

/** The rectangle between two places: `{rows: [first, last], columns: [first, last]}`. */
export function rectangle(one, other) {
  const inOrder = (key) => [Math.min(one[key], other[key]), Math.max(one[key], other[key])];
  return { rows: inOrder("row"), columns: inOrder("column") };
}

/** Whether a place is in a rectangle. */
export const contains = ({ rows, columns }, { row, column }) =>
  row >= rows[0] && row <= rows[1] && column >= columns[0] && column <= columns[1];

/**
 * What a rectangle of days has and needs: its days that are not complete, by state; the dates to process; and the requests
 * to retry. A request processes all countries of its date.
 */
export function selectionOf(grid, chosen) {
  const rows = rowsOf(grid).slice(chosen.rows[0], chosen.rows[1] + 1);
  const [first, last] = chosen.columns;
  const dates = grid.dates.slice(first, last + 1);
  const cells = rows.flatMap((row) => row.days.slice(first, last + 1).map((day) => ({ row, day })));
  const retried = new Map();
  for (const { day } of cells) {
    const date = grid.dates.find((one) => one.date === day.date);
    if (day.action === "retry" && date.request_id) retried.set(date.request_id, date.date);
  }
  return {
    title: [rows.length === 1 ? rows[0].name : `${rows[0].name} to ${rows.at(-1).name}`, daysInWords(dates[0].date, dates.at(-1).date)].join(", "),
    cells,
    dates,
    counts: countsOf(cells.map(({ day }) => day)),
    toProcess: dates.filter(({ date, action }) => action === "process" || cells.some(({ day }) => day.date === date && day.action === "process")),
    toRetry: [...retried].map(([id, date]) => ({ id, date })),
  };
}

/** How many days are in each state, in the order of STATES. */
export function countsOf(days) {
  const counts = new Map(Object.keys(STATES).map((state) => [state, 0]));
  for (const { state } of days) counts.set(state, counts.get(state) + 1);
  return [...counts].filter(([, number]) => number);
}
