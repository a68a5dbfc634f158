// The dialog of chosen days: why they are incomplete, what would be requested, and the cities that a day lacks.

import { askMissing, missingCities, retry } from "../api.js";
import { announce, button, element, scrollable } from "../dom.js";
import { count, days as daysInWords, daysIn, instant, plural } from "../format.js";
import { problemNotice } from "../problems.js";
import { urlOf } from "../views.js";
import { classOf } from "./states.js";

const REASONS_MAX = 8;

/** Open the dialog of a selection. Calls `onasked()` when dates were requested or retried, and `onclose()` at the end. */
export function openSelection(selection, { onasked, onclose }) {
  const dialog = document.getElementById("country-day");
  const { title, cells, dates } = selection;
  const [only] = cells.length === 1 ? cells : [];
  const done = element("div", { role: "status" });
  const content = element(
    "div",
    { class: "content" },
    element("header", {}, element("h2", { id: "country-day-title" }, title), button("Close", () => dialog.close(), { "aria-keyshortcuts": "Escape" })),
    only ? element("p", {}, badge(only.day.state), reasonOf(only.day)) : summary(selection),
    actions(selection, done, onasked),
    done,
    only?.row.country && only.day.state !== "complete" && only.day.cities_expected ? missing(only.row.country, only.day.date) : "",
    element("p", {}, element("a", { href: urlOf("/", { from: dates[0].date, to: dates.at(-1).date, country: only?.row.country }) }, "Statistics of these days")),
  );
  content.querySelector("a").addEventListener("click", () => dialog.close());
  dialog.replaceChildren(content);
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.addEventListener("close", onclose, { once: true });
  dialog.showModal();
}

const badge = (state) => element("span", { class: `badge ${classOf(state)}` }, state);

function reasonOf(day) {
  const cities = day.cities_expected ? ` ${count(day.cities_reported ?? 0)} of ${plural(day.cities_expected, "city", "cities")} counted.` : "";
  const freshness = day.last_ingested_at ? ` The newest file was ingested ${instant(day.last_ingested_at)}.` : "";
  return `${day.reason ? ` ${day.reason}.` : ""}${cities}${freshness}`;
}

function summary({ cells, counts }) {
  const reasons = [...new Map(cells.filter(({ day }) => day.reason).map(({ row, day }) => [`${day.date} ${day.reason}`, `${row.name}, ${day.date}: ${day.reason}`])).values()];
  return element(
    "div",
    {},
    element("p", {}, counts.map(([state, number]) => [badge(state), ` ${count(number)} `]).flat()),
    element("ul", {}, reasons.slice(0, REASONS_MAX).map((reason) => element("li", {}, reason))),
    reasons.length > REASONS_MAX ? element("p", {}, `and ${count(reasons.length - REASONS_MAX)} more.`) : "",
  );
}

// The text beside each button is what the button requests.
function actions({ toProcess, toRetry }, done, onasked) {
  const offers = [];
  if (toRetry.length) {
    const dates = toRetry.map(({ date }) => date);
    const ids = toRetry.map(({ id }) => id);
    offers.push([
      `Retry ${plural(toRetry.length, "request")}`,
      `Fetches the failed cities of ${datesInWords(dates)} again, in all countries.`,
      () => retryAll(ids),
    ]);
  }
  if (toProcess.length) {
    const [first, last] = [toProcess[0].date, toProcess.at(-1).date];
    offers.push([
      `Process ${plural(toProcess.length, "date")}`,
      `Requests ${datesInWords(toProcess.map(({ date }) => date))}, for all countries. Unchanged files are not stored again.`,
      () => askMissing(first, last),
    ]);
  }
  return element(
    "ul",
    { class: "offers" },
    offers.map(([name, text, send]) => {
      const pressed = button(name, () => ask(pressed, text, send, done, onasked), { class: "primary" });
      return element("li", {}, pressed, " ", text);
    }),
  );
}

// Retries one request after another, because a year has hundreds. After a failure, `ids` has those that are left.
async function retryAll(ids) {
  for (; ids.length; ids.shift()) await retry(ids[0]);
}

async function ask(pressed, text, send, done, onasked) {
  pressed.disabled = true;
  try {
    await send();
    done.replaceChildren(element("p", {}, "Requested. ", element("a", { href: "/jobs" }, "See the jobs")));
    done.querySelector("a").addEventListener("click", () => pressed.closest("dialog").close());
    announce(text);
    onasked();
  } catch (problem) {
    pressed.disabled = false;
    done.replaceChildren(problemNotice(problem));
  }
}

function datesInWords(dates) {
  const isWhole = daysIn(dates[0], dates.at(-1)) === dates.length;
  return isWhole ? daysInWords(dates[0], dates.at(-1)) : `${plural(dates.length, "date")} from ${daysInWords(dates[0], dates.at(-1))}`;
}

function missing(country, date) {
  const place = element("div", { "aria-busy": "true" }, element("p", { class: "loading" }, "Reading the missing cities…"));
  missingCities(country, date)
    .then((found) => place.replaceChildren(found.missing.length ? missingTable(found) : ""))
    .catch((problem) => place.replaceChildren(problem.status === 404 ? "" : problemNotice(problem)))
    .finally(() => place.setAttribute("aria-busy", "false"));
  return place;
}

const missingTable = ({ missing, missing_total: total }) =>
  scrollable(
    element(
      "table",
      { class: "rows" },
      element("caption", {}, `${plural(total, "missing city", "missing cities")}${total > missing.length ? `, the first ${count(missing.length)}` : ""}`),
      element("thead", {}, element("tr", {}, ["City", "State", "Usually ingested"].map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, missing.map(missingRow)),
    ),
  );

const missingRow = (city) =>
  element(
    "tr",
    {},
    element("th", { scope: "row" }, city.city_name, element("small", {}, ` id ${city.city_id}`)),
    element("td", {}, city.state, city.reason ? `: ${city.reason}` : "", city.quarantine_key ? element("p", {}, "The file is kept at ", element("code", {}, city.quarantine_key)) : ""),
    element("td", {}, city.usual_at ? usual(city.usual_at) : "not known yet"),
  );

function usual(at) {
  const hours = (Date.now() - Date.parse(at)) / 3_600_000;
  return `${instant(at)}${hours > 0 && hours < 48 ? `, ${hours < 1 ? "less than an hour" : plural(Math.floor(hours), "hour")} ago` : ""}`;
}
