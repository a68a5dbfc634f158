// The view of completeness: which days of which countries are complete, why others are not, and what to do.

import { completeness } from "../api.js";
import { announce, element } from "../dom.js";
import { count, days as daysInWords, daysIn, instant, moved, plural } from "../format.js";
import { polling } from "../polling.js";
import { problemNotice } from "../problems.js";
import { latestRange } from "../ranges.js";
import { setTitle, visit } from "../views.js";
import { openSelection } from "./dialog.js";
import { completenessMap } from "./map.js";
import { STATES, classOf, countsOf, selectionOf } from "./states.js";

const PATH = "/completeness";
const POLL_MS = 10_000;
const LONG_RANGE_POLL_MS = 30_000;
const LONG_RANGE_DAYS = 92;
const ZOOM_DAYS = 3;
const QUIET_MS = 400;

const form = document.getElementById("completeness-range");
const place = document.getElementById("completeness-grid");
const notices = document.getElementById("completeness-notices");
const polled = polling(look, () => (daysIn(range.from, range.to) > LONG_RANGE_DAYS ? LONG_RANGE_POLL_MS : POLL_MS));

let range = null;
let loading = null;
let shown = null; // the displayed grid with its range and ETag

export const view = { path: PATH, title: "Completeness", place: "completeness", open, close };

const overview = element("div");
const cells = element("div");
place.append(overview, cells);
const map = completenessMap(cells, {
  onopen: (chosen) => openSelection(selectionOf(shown.grid, chosen), { onasked: look, onclose: () => map.focus() }),
  onzoom(column) {
    const { date } = shown.grid.dates[column];
    visit(PATH, { from: moved(date, -ZOOM_DAYS), to: moved(date, ZOOM_DAYS) });
  },
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const { from, to } = Object.fromEntries(new FormData(form));
  if (from && to) visit(PATH, { from, to });
  else notices.replaceChildren(problemNotice({ title: "A date is missing", message: "Enter a first and a last date." }));
});
for (const mover of form.querySelectorAll("[data-move]")) {
  mover.addEventListener("click", () => {
    if (!range) return;
    const by = daysIn(range.from, range.to) * Number(mover.dataset.move);
    visit(PATH, { from: moved(range.from, by), to: moved(range.to, by) });
  });
}

async function open({ from, to }) {
  loading?.abort();
  loading = new AbortController();
  const { signal } = loading;
  if (!(from && to)) {
    await openLatestRange(signal);
    return;
  }
  range = { from, to };
  form.elements.from.value = from;
  form.elements.to.value = to;
  setTitle(daysInWords(from, to));
  if (shown && (shown.range.from !== from || shown.range.to !== to)) shown = null;
  place.setAttribute("aria-busy", "true");
  const slow = setTimeout(() => shown ?? overview.replaceChildren(element("p", { class: "loading" }, "Reading the completeness…")), QUIET_MS);
  await polled.start();
  clearTimeout(slow);
}

async function openLatestRange(signal) {
  try {
    const latest = await latestRange();
    if (!signal.aborted) visit(PATH, latest, { replace: true });
  } catch (problem) {
    if (signal.aborted) return;
    notices.replaceChildren(problemNotice(problem, () => openLatestRange(signal)));
    place.setAttribute("aria-busy", "false");
  }
}

function close() {
  loading?.abort();
  polled.stop();
}

async function look() {
  const { signal } = loading;
  const asked = range;
  try {
    const { etag, body } = await completeness(asked, { signal, etag: shown?.etag });
    notices.replaceChildren();
    if (body) show(asked, etag, body);
  } catch (problem) {
    if (signal.aborted) return;
    notices.replaceChildren(problemNotice(problem, look));
    if (!shown) for (const part of [overview, cells]) part.replaceChildren();
  }
  place.setAttribute("aria-busy", "false");
}

function show(asked, etag, grid) {
  const isFirst = !shown;
  shown = { range: asked, etag, grid };
  const days = grid.countries.flatMap((country) => country.days);
  const counts = countsOf(days.length ? days : grid.dates);
  overview.replaceChildren(legend(counts), freshness(grid));
  map.draw(grid);
  const incomplete = days.filter(({ action }) => action).length;
  announce(isFirst ? `Completeness of ${daysInWords(asked.from, asked.to)}: ${plural(incomplete, "country-day")} not complete.` : "The completeness has changed.");
}

const legend = (counts) =>
  element(
    "ul",
    { class: "states", "aria-label": "Country-days by state" },
    counts.map(([state, number]) =>
      element("li", {}, element("i", { class: classOf(state), "aria-hidden": "true" }, STATES[state].letter), element("strong", {}, `${count(number)} ${state}`), element("small", {}, STATES[state].text)),
    ),
  );

function freshness(grid) {
  const late = grid.dates.filter(({ deadline }) => deadline);
  const newest = grid.last_ingested_at ? `The newest file was ingested ${instant(grid.last_ingested_at)}.` : "No file of these days was ingested yet.";
  const missed = late.length ? ` ${plural(late.length, "date")} missed a deadline: ${late.map(({ date }) => date).join(", ")}.` : "";
  return element("div", {}, element("p", { class: late.length ? "provisional-text" : null }, newest, missed), element("p", { class: "none-text" }, "Choose a day, or drag over several, to see why and to process them."));
}
