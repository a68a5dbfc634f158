// The totals of the range, and how they changed.

import { element } from "../dom.js";
import { change, count, days, plural } from "../format.js";
import { COMPARISONS, totalChange } from "./compare.js";
import { MEASURES, measureOf, words } from "./measures.js";

/** Create the tiles of a model, with what they are compared with and how complete they are. */
export function tiles(model) {
  const { state, total, comparison } = model;
  const measures = Object.keys(MEASURES).map((key) => measureOf(key, Boolean(state.rate)));
  return element(
    "div",
    {},
    element("dl", { class: "tiles" }, measures.map((measure) => tile(measure, total, comparison, isWhole(model)))),
    state.compare ? comparedText(model) : null,
    completenessText(model),
  );
}

const knownDays = ({ complete, provisional }) => complete + provisional;
const isWhole = ({ total, comparison }) => comparison?.pairs === knownDays(total);

function tile(measure, total, comparison, hasBefore) {
  const percent = comparison ? totalChange(comparison, measure) : null;
  const before = hasBefore ? words(measure, measure.of(comparison.total.before)) : "";
  return element(
    "div",
    {},
    element("dt", {}, measure.name),
    element("dd", {}, words(measure, measure.of(total))),
    comparison
      ? element("dd", { class: "delta" }, percent === null ? "no comparison" : change(percent), before ? element("small", {}, ` from ${before}`) : "")
      : null,
  );
}

function comparedText(model) {
  const { state, total, comparison, comparedDates } = model;
  if (!comparison) return element("p", { class: "compared" }, "Reading the earlier days…");
  const range = days(comparedDates.from, comparedDates.to);
  const known = plural(knownDays(total), "country-day");
  const shared = isWhole(model) ? "" : ` Changes count the ${count(comparison.pairs)} of ${known} that have data in both.`;
  return element("p", { class: "compared" }, `Compared with ${COMPARISONS[state.compare]}, ${range}.${shared}`);
}

function completenessText({ total, countries }) {
  return element(
    "p",
    { class: total.provisional ? "provisional-text" : null },
    `${plural(countries.length, "country", "countries")}, ${plural(knownDays(total), "country-day")} with data: `,
    total.provisional
      ? `${count(total.provisional)} provisional: files of cities are missing, so the numbers will change.`
      : "all complete.",
    total.none ? ` ${plural(total.none, "country-day")} without data.` : "",
  );
}
