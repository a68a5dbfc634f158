// The ranked list of what is unusual in the range.

import { button, element, yieldToBrowser } from "../dom.js";
import { count, days } from "../format.js";
import { urlOf } from "../views.js";
import { deviationInWords, unusualRuns, valuesInWords } from "./deviation.js";
import { paramsOf } from "./state.js";

const LISTED = 8;

/** Fill an element with the unusual runs of days of a model, the strongest first. Stops when `signal` aborts. */
export async function showUnusual(place, { state, countries }, history, signal) {
  if (!history.size) {
    place.replaceChildren(element("p", {}, "No earlier days are known to compare with."));
    return;
  }
  const runs = [];
  for (const country of countries) {
    runs.push(...unusualRuns(country, history.get(country.slug) ?? []));
    await yieldToBrowser();
    if (signal.aborted) return;
  }
  runs.sort((one, other) => other.score - one.score);
  place.replaceChildren(runs.length ? listOf(runs, state) : element("p", {}, "Nothing is unusual in this range."));
}

function listOf(runs, state) {
  const list = element("ol", { class: "unusual" }, runs.slice(0, LISTED).map((run) => item(run, state)));
  const hidden = runs.length - LISTED;
  const more = button(`Show ${count(hidden)} more`, () => {
    list.append(...runs.slice(LISTED).map((run) => item(run, state)));
    list.children[LISTED].querySelector("a").focus();
    more.remove();
  });
  return element("div", {}, list, hidden > 0 ? more : null);
}

function item(run, state) {
  const { country, watched, from, to } = run;
  const href = urlOf("/", paramsOf({ ...state, country: country.slug, measure: watched.measure, find: "" }));
  return element(
    "li",
    {},
    element("a", { href }, `${country.name}, ${days(from, to)}`),
    `: ${deviationInWords(run)} `,
    element("small", {}, valuesInWords(run)),
  );
}
