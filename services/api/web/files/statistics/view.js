// The view of the statistics: reads the numbers of the range, and the earlier days that they are compared with.

import { announce, element, hideHint } from "../dom.js";
import { days, moved } from "../format.js";
import { problemNotice } from "../problems.js";
import { latestRange } from "../ranges.js";
import { keepInUrl, setTitle, visit } from "../views.js";
import { compare, shiftOf } from "./compare.js";
import { listenToForm, nameOf, offer, showInForm } from "./form.js";
import { explain } from "./reasons.js";
import { daysBySlug, earlierRange, keptStats, readEarlier, readStats } from "./reading.js";
import { results } from "./results.js";
import { hasRange, paramsOf, rangeOf, stateOf } from "./state.js";
import { showUnusual } from "./unusual.js";

const PATH = "/";
const QUIET_MS = 400;
const REVALIDATE_MS = 15_000;
const OWN_HISTORY_ENTRY = ["from", "to", "country", "compare"];

const place = document.getElementById("results");
const shown = results(place, { onchange });

let state = null; // what the URL says
let drawn = null; // what is displayed: the statistics, the earlier days, and the state
let ranked = null; // the statistics and the earlier days of the displayed list of what is unusual
let loading = null; // the AbortController of the last reading
let timer = null;

export const view = { path: PATH, title: "Statistics", place: "statistics", open, close };

listenToForm(() => state, { onchange, onproblem: (problem) => fail(problem) });
addEventListener("focus", revalidate);
document.addEventListener("visibilitychange", revalidate);

function open(params) {
  state = stateOf(params);
  clearInterval(timer);
  timer = setInterval(revalidate, REVALIDATE_MS);
  if (!(state.from && state.to)) {
    openLatestRange();
    return;
  }
  showInForm(state);
  nameView();
  load();
}

function close() {
  clearInterval(timer);
  loading?.abort();
  hideHint();
}

/** Change the state. A new range is a new entry of the history; another way to show it is not. */
function onchange(changes) {
  const changed = { ...state, ...changes };
  if (OWN_HISTORY_ENTRY.some((key) => changed[key] !== state[key])) {
    visit(PATH, paramsOf(changed));
    return;
  }
  state = changed;
  keepInUrl(paramsOf(state));
  if (drawn) draw(drawn.stats, drawn.earlier);
}

function nameView() {
  const range = hasRange(state) ? days(state.from, state.to) : "";
  setTitle([state.country && nameOf(state.country), range].filter(Boolean).join(", "));
}

// Without a range in the URL, show the dates that were requested last.
async function openLatestRange() {
  const mine = begin();
  try {
    const range = await latestRange();
    if (!mine.signal.aborted) visit(PATH, paramsOf({ ...state, ...range }), { replace: true });
  } catch (problem) {
    if (!mine.signal.aborted) fail(problem, openLatestRange);
  } finally {
    end(mine);
  }
}

function begin() {
  loading?.abort();
  loading = new AbortController();
  place.setAttribute("aria-busy", "true");
  return loading;
}

function end(mine) {
  if (mine === loading) place.setAttribute("aria-busy", "false");
}

// Displayed statistics of the same range stay until changed ones arrive.
async function load() {
  const mine = begin();
  const { signal } = mine;
  const range = rangeOf(state);
  if (drawn && !isSame(drawn.range, range)) drawn = null;
  const slow = setTimeout(() => drawn || place.replaceChildren(element("p", { class: "loading" }, "Reading the statistics…")), QUIET_MS);
  try {
    const stats = await readStats(range, signal);
    signal.throwIfAborted();
    const before = earlierRange(state, shiftOf(state.compare, stats.dates.length));
    place.querySelector(":scope > .error")?.remove();
    draw(stats, keptStats(before));
    end(mine);
    if (stats.countries.length) await Promise.all([showEarlier(stats, before, signal), showReasons(stats, range, signal)]);
  } catch (problem) {
    if (!signal.aborted) fail(problem, load);
  } finally {
    clearTimeout(slow);
    end(mine);
  }
}

async function showEarlier(stats, before, signal) {
  try {
    const earlier = await readEarlier(before, signal);
    signal.throwIfAborted();
    draw(stats, earlier);
    if (ranked?.stats === stats && ranked.earlier === earlier) return;
    await showUnusual(shown.unusual, { state, ...stats }, daysBySlug(earlier), signal);
    if (!signal.aborted) ranked = { stats, earlier };
  } catch (problem) {
    if (signal.aborted) return;
    ranked = null;
    shown.unusual.replaceChildren(problemNotice(problem, load));
  }
}

// The numbers stay without the reasons if these cannot be read.
async function showReasons(stats, range, signal) {
  const isNew = await explain(stats, range, signal).catch(() => false);
  if (!isNew || signal.aborted || drawn?.stats !== stats) return;
  drawn.state = null; // draw it again
  draw(stats, drawn.earlier);
}

const isSame = (one, other) => JSON.stringify(one) === JSON.stringify(other);

function draw(stats, earlier) {
  const used = state.compare && stats.countries.length ? earlier : null;
  const isDrawn = drawn && drawn.stats === stats && drawn.used === used && isSame(drawn.state, state);
  const isNew = drawn?.stats !== stats;
  drawn = { stats, earlier, used, state, range: rangeOf(state) };
  if (isDrawn) return;
  offer(stats.countries, state.country);
  nameView();
  shown.draw(state, stats, used && comparedOf(stats, used));
  if (!isNew) return;
  announce(`Statistics of ${days(state.from, state.to)}.`);
  if (stats !== ranked?.stats) shown.unusual.replaceChildren(element("p", { class: "loading" }, "Looking for unusual days…"));
}

function comparedOf({ countries, dates }, earlier) {
  const shift = shiftOf(state.compare, dates.length);
  return {
    comparison: compare(countries, daysBySlug(earlier), shift),
    dates: { from: moved(dates[0], -shift), to: moved(dates.at(-1), -shift) },
  };
}

// Displayed statistics stay below the error message.
function fail(problem, again) {
  place.querySelector(":scope > .error")?.remove();
  const message = problemNotice(problem, again);
  if (drawn) place.prepend(message);
  else place.replaceChildren(message);
}

function revalidate() {
  const isOpen = !document.getElementById(view.place).hidden;
  const isBusy = place.getAttribute("aria-busy") === "true";
  if (isOpen && drawn && !isBusy && !document.hidden) load();
}
