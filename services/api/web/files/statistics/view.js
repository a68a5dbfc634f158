// The view of the statistics: a range of days, its map, its lines and its tables.

import { countryStats, latestRequests, statsFile } from "../api.js";
import { announce, button, element, hideHint, notice } from "../dom.js";
import { count, daysIn, delay, moved, plural } from "../format.js";
import { problemNotice } from "../problems.js";
import { requestedRange, todayInUtc } from "../ranges.js";
import { keepInUrl, setTitle, urlOf, visit } from "../views.js";
import { openCountryDay } from "./country_day.js";
import { heatmap, keepingFocus } from "./heatmap.js";
import { LINES_MAX, lines } from "./lines.js";
import { Gathered, MEASURES } from "./stats.js";
import { countriesTable, daysTable } from "./tables.js";

const PATH = "/";
const LINES_AT_FIRST = 5;
const REQUESTS_LOOKED_AT = 20;
const QUIET_MS = 400;
const REVALIDATE_MS = 60_000;

const form = document.getElementById("range");
const results = document.getElementById("results");

let shown = null; // the state in the URL: from, to, country, measure
let loading = null; // the AbortController of the statistics request in progress
let etag = null; // of the displayed statistics; null: none are displayed
let chosen = null; // the slugs of the countries with a line; null: the largest countries
let timer = null;

export const view = { path: PATH, title: "Statistics", place: "statistics", open, close };

function open({ from = "", to = "", country = "", measure }) {
  const before = shown;
  shown = { from, to, country, measure: measure in MEASURES ? measure : "delay" };
  clearInterval(timer);
  timer = setInterval(revalidate, REVALIDATE_MS);
  setTitle(from && to ? `${from} to ${to}` : "");
  if (!(from && to)) openRequestedRange();
  else load({ quietly: etag !== null && JSON.stringify(before) === JSON.stringify(shown) });
}

function close() {
  clearInterval(timer);
  loading?.abort();
  hideHint();
}

const go = (changes) => visit(PATH, { ...shown, ...changes });

// Without a range in the URL, show the dates that were requested last.
async function openRequestedRange() {
  loading?.abort();
  loading = new AbortController();
  const mine = loading;
  try {
    const range = requestedRange(await latestRequests(REQUESTS_LOOKED_AT), todayInUtc());
    if (mine === loading && !mine.signal.aborted) visit(PATH, { ...shown, ...range }, { replace: true });
  } catch (problem) {
    if (mine !== loading) return;
    fail(problem, openRequestedRange);
    results.setAttribute("aria-busy", "false");
  }
}

// With `quietly`, the page keeps the displayed statistics until changed ones arrive.
async function load({ quietly = false } = {}) {
  form.elements.from.value = shown.from;
  form.elements.to.value = shown.to;
  loading?.abort();
  loading = new AbortController();
  const { signal } = loading;
  results.setAttribute("aria-busy", "true");
  if (!quietly) {
    etag = null;
    const slow = setTimeout(() => results.replaceChildren(element("p", { class: "loading" }, "Reading the statistics…")), QUIET_MS);
    signal.addEventListener("abort", () => clearTimeout(slow));
    loading.slow = slow;
  }
  const mine = loading;
  try {
    const gathered = new Gathered();
    const now = await countryStats(shown, { signal, etag }, (days) => gathered.add(days));
    results.querySelector(":scope > .error")?.remove();
    if (now === etag) return;
    keepingFocus(results, () => show(gathered.arranged()));
    etag = now;
    announce(`Statistics from ${shown.from} to ${shown.to}.`);
  } catch (problem) {
    if (problem.name === "AbortError") return;
    fail(problem, () => load());
  } finally {
    clearTimeout(mine.slow);
    if (mine === loading) {
      loading = null;
      results.setAttribute("aria-busy", "false");
    }
  }
}

// Displayed statistics stay below the error message.
function fail(problem, again) {
  const message = problemNotice(problem, again);
  results.querySelector(":scope > .error")?.remove();
  if (etag) results.prepend(message);
  else results.replaceChildren(message);
}

function revalidate() {
  const isOpen = !document.getElementById(view.place).hidden;
  if (isOpen && etag && !loading && !document.hidden) load({ quietly: true });
}

function show(stats) {
  hideHint();
  choices(stats.countries);
  if (stats.countries.length === 0) {
    results.replaceChildren(
      notice(
        "empty",
        "No data in this range",
        shown.country
          ? "This country has no data on these days. Choose another country, or process the days."
          : "These days have not been processed yet. Process them to see results here.",
        element("a", { class: "button", href: urlOf("/jobs", { from: shown.from, to: shown.to }) }, "Process these days"),
      ),
    );
    return;
  }
  const map = element("div");
  const graph = element("div");
  const table = element("div");
  const drawMap = () => map.replaceChildren(heatmap(stats, shown.measure, openCountryDay));
  const drawLines = () => {
    const some = stats.countries.filter((country) => chosen.has(country.slug));
    graph.replaceChildren(
      some.length ? lines(some, stats.dates, shown.measure) : notice("empty", "No country is selected", "Select countries in the table below."),
    );
  };
  const drawTable = () =>
    table.replaceChildren(
      shown.country
        ? daysTable(stats.countries[0], (day) => openCountryDay(stats.countries[0], day))
        : countriesTable(stats.countries, {
            chosen,
            linesMax: LINES_MAX,
            onchoose: (slug, on) => {
              chosen[on ? "add" : "delete"](slug);
              drawLines();
              for (const box of table.querySelectorAll("input")) box.disabled = !box.checked && chosen.size >= LINES_MAX;
            },
            onopen: (country) => go({ country: country.slug }),
          }),
    );
  const there = new Set(stats.countries.map((country) => country.slug));
  chosen = new Set([...(chosen ?? [])].filter((slug) => there.has(slug)));
  if (!chosen.size) {
    const largest = [...stats.countries].sort((one, other) => other.total.bus_count - one.total.bus_count);
    chosen = new Set(largest.slice(0, LINES_AT_FIRST).map((country) => country.slug));
  }
  drawMap();
  drawTable();
  results.replaceChildren(
    overview(stats),
    measures(() => {
      drawMap();
      drawLines();
    }),
    element("h3", {}, "By country and day"),
    map,
    element("h3", {}, "Day by day"),
    graph,
    element("h3", {}, "In numbers"),
    table,
    downloads(),
  );
  drawLines();
}

function choices(countries) {
  const select = form.elements.country;
  const known = new Map([...select.options].map((option) => [option.value, option.text]));
  for (const { slug, name } of countries) known.set(slug, name);
  if (shown.country && !known.has(shown.country)) known.set(shown.country, shown.country);
  known.delete("");
  const sorted = [...known].sort(([, one], [, other]) => one.localeCompare(other, "en"));
  select.replaceChildren(new Option("All countries", ""), ...sorted.map(([slug, name]) => new Option(name, slug)));
  select.value = shown.country;
}

function overview({ countries, total }) {
  const tile = (name, text) => element("div", {}, element("dt", {}, name), element("dd", {}, text));
  const known = total.complete + total.provisional;
  return element(
    "div",
    {},
    element(
      "dl",
      { class: "tiles" },
      tile("Average delay", delay(total.average_delay_s)),
      tile("Passengers", count(total.passenger_count)),
      tile("Buses", count(total.bus_count)),
      tile("Accidents", count(total.accident_count)),
    ),
    element(
      "p",
      { class: total.provisional ? "provisional-text" : null },
      `${plural(countries.length, "country", "countries")}, ${plural(known, "country-day")} with data: `,
      total.provisional
        ? `${count(total.provisional)} provisional: files of cities are missing, so the numbers will change.`
        : "all complete.",
      total.none ? ` ${plural(total.none, "country-day")} without data.` : "",
    ),
  );
}

function measures(redraw) {
  return element(
    "fieldset",
    { class: "measures" },
    element("legend", { class: "unseen" }, "Measure"),
    Object.entries(MEASURES).map(([key, { name }]) =>
      element(
        "label",
        {},
        element("input", {
          type: "radio",
          name: "measure",
          value: key,
          checked: key === shown.measure,
          onchange: () => {
            shown.measure = key;
            keepInUrl(shown);
            redraw();
          },
        }),
        element("span", {}, name),
      ),
    ),
  );
}

function downloads() {
  const save = async (type, ending) => {
    try {
      const href = URL.createObjectURL(await statsFile(shown, type));
      const name = [shown.country || "countries", shown.from, shown.to].join("_");
      element("a", { href, download: `${name}.${ending}` }).click();
      setTimeout(() => URL.revokeObjectURL(href), 60_000);
    } catch (problem) {
      results.append(notice("error", problem.title ?? "The request failed", problem.message));
    }
  };
  return element(
    "p",
    { class: "downloads" },
    "Download these numbers: ",
    button("CSV", () => save("text/csv", "csv")),
    button("JSON", () => save("application/json", "json")),
    button("NDJSON", () => save("application/x-ndjson", "ndjson")),
  );
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const { from, to, country } = Object.fromEntries(new FormData(form));
  if (!from || !to) results.replaceChildren(notice("error", "A date is missing", "Enter a first and a last date."));
  else go({ from, to, country });
});
form.elements.country.addEventListener("change", () => form.requestSubmit());
for (const mover of form.querySelectorAll("[data-move]")) {
  mover.addEventListener("click", () => {
    const days = daysIn(shown.from, shown.to) * Number(mover.dataset.move);
    go({ from: moved(shown.from, days), to: moved(shown.to, days) });
  });
}
addEventListener("focus", revalidate);
document.addEventListener("visibilitychange", revalidate);
