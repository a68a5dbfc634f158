// The state of the statistics in their URL. Pure.

import { COMPARISONS } from "./compare.js";
import { MEASURES } from "./measures.js";
import { ORDERS } from "./rows.js";

const CHOICES = {
  measure: ["delay", ...Object.keys(MEASURES)],
  rate: ["", "1000"],
  compare: ["", ...Object.keys(COMPARISONS)],
  map: ["", "change"],
  colours: ["", "within"],
  sort: ["", ...Object.keys(ORDERS)],
};

/** The state of the parameters of a URL. An unknown choice becomes the default, which is the first one. */
export function stateOf({ from = "", to = "", country = "", find = "", ...params }) {
  const chosen = Object.entries(CHOICES).map(([key, known]) => [key, known.includes(params[key]) ? params[key] : known[0]]);
  return { from, to, country, find, ...Object.fromEntries(chosen) };
}

/** The parameters of a state, without defaults. */
export function paramsOf(state) {
  return Object.fromEntries(Object.entries(state).filter(([key, value]) => value !== CHOICES[key]?.[0]));
}

/** The parts of a state that decide which numbers are read. */
export const rangeOf = ({ from, to, country }) => ({ from, to, country });

/** Whether both dates of a state are dates. */
export const hasRange = ({ from, to }) => [from, to].every((date) => /^\d{4}-\d\d-\d\d$/.test(date) && !Number.isNaN(Date.parse(date)));
