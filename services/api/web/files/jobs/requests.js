// The form that requests dates, and the list of requests with their progress.

import { ask, cancel, follow, latestRequests, request, retry } from "../api.js";
import { announce, button, element, notice } from "../dom.js";
import { problemNotice } from "../problems.js";
import { bytes, count, daysIn, instant, plural } from "../format.js";

const LISTED = 20;
const POLL_UNDER_WAY_MS = 2_000;
const STREAMS_MAX = 3; // a browser opens six connections to a host, and the other requests need some
const POLL_IDLE_MS = 15_000;
const ENDS = new Set(["completed", "completed with failures", "failed", "cancelled"]);
const MARKS = { completed: "✓", "completed with failures": "!", failed: "✕", cancelled: "–" };

const ended = (one) => ENDS.has(one.status);

/**
 * Show the latest requests. Calls `onasked()` after a request. Returns `start()` and `stop()`, which begin and end the
 * updates.
 */
export function watchRequests({ onasked }) {
  const form = document.getElementById("ask");
  const place = document.getElementById("latest");
  const rows = new Map();
  const streams = new Map();
  let timer = null;
  let stopped = true;
  let first = true;

  async function look() {
    clearTimeout(timer);
    let wait = POLL_IDLE_MS;
    try {
      const listed = await latestRequests(LISTED);
      show(listed);
      if (listed.some((one) => !ended(one))) wait = POLL_UNDER_WAY_MS;
      listed.filter((one) => !ended(one)).forEach(({ id }) => stream(id));
      first = false;
    } catch (problem) {
      place.querySelector(".error")?.remove();
      place.prepend(problemNotice(problem, look));
    }
    place.setAttribute("aria-busy", "false");
    clearTimeout(timer);
    if (!stopped) timer = setTimeout(look, wait);
  }

  // Requests without a stream are updated by polling the list.
  function stream(id) {
    if (streams.has(id) || streams.size >= STREAMS_MAX) return;
    const stopping = new AbortController();
    streams.set(id, stopping);
    follow(id, update, stopping.signal)
      .catch(() => {})
      .finally(() => streams.delete(id));
  }

  function update(one) {
    const row = rows.get(one.id);
    if (!row || row.shown?.version > one.version) return;
    const before = row.shown;
    row.show(one);
    if (first || !ended(one) || before?.version === one.version) return;
    if (before?.status !== one.status) announce(`The request for ${one.date} is ${one.status}.`);
  }

  function show(listed) {
    const list = place.querySelector("ul") ?? element("ul", { class: "requests" });
    for (const one of listed) {
      if (!rows.has(one.id)) rows.set(one.id, rowOf(look));
      update(one);
    }
    const ids = new Set(listed.map((one) => one.id));
    for (const id of rows.keys()) if (!ids.has(id)) rows.delete(id);
    const wanted = listed.map((one) => rows.get(one.id).item);
    if (wanted.some((item, at) => list.children[at] !== item) || list.children.length !== wanted.length) {
      list.replaceChildren(...wanted);
    }
    if (listed.length) place.replaceChildren(list);
    else place.replaceChildren(notice("empty", "No date has been requested yet", "Choose dates above. Their progress appears here."));
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const asked = document.getElementById("asked");
    const { from, to } = Object.fromEntries(new FormData(form));
    if (!from || !to) {
      asked.replaceChildren(notice("error", "A date is missing", "Enter a first and a last date."));
      return;
    }
    const send = form.querySelector("button");
    send.disabled = true;
    try {
      await ask(from, to);
      asked.replaceChildren(element("p", {}, `Requested ${plural(daysIn(from, to), "date")}.`));
    } catch (problem) {
      asked.replaceChildren(notice("error", problem.title ?? "The request failed", problem.message));
    } finally {
      send.disabled = false;
    }
    look();
    onasked();
  });

  function start() {
    stopped = false;
    look();
  }

  function stop() {
    stopped = true;
    clearTimeout(timer);
    for (const stopping of streams.values()) stopping.abort();
  }

  return { start, stop };
}

function rowOf(onchange) {
  const mark = element("span", { class: "mark", "aria-hidden": "true" });
  const title = element("strong");
  const status = element("span", { class: "status" });
  const bar = element("progress");
  const done = element("p", { class: "done" });
  const failures = element("details", { hidden: true }, element("summary"), element("div"));
  const stop = button("Cancel", () => act(stop, cancel));
  const again = button("Retry the failed cities", () => act(again, retry));
  const acted = element("p", { role: "status", hidden: true });
  const top = element("p", { class: "title" }, mark, title, status, stop);
  const item = element("li", {}, top, bar, done, failures, again, acted);
  const row = { item, shown: null, show };
  again.hidden = true;

  async function act(pressed, change) {
    pressed.disabled = true;
    try {
      const retried = row.shown.counts.cities_failed;
      await change(row.shown.id);
      acted.textContent = change === cancel ? "Cancelling. Cities already in progress finish normally." : `Retrying ${plural(retried, "city", "cities")}.`;
    } catch (problem) {
      acted.textContent = problem.message;
    }
    acted.hidden = false;
    pressed.disabled = false;
    onchange();
  }

  failures.addEventListener("toggle", () => failures.open && fillFailures(failures, row.shown.id));

  function show(one) {
    const { counts } = one;
    if (row.shown?.version === one.version && row.shown.status === one.status) return;
    row.shown = one;
    item.className = one.status.replaceAll(" ", "-");
    mark.textContent = MARKS[one.status] ?? "…";
    title.textContent = one.date;
    status.textContent = one.cancelled_at && !ended(one) ? `${one.status}, being cancelled` : one.status;
    stop.hidden = ended(one) || Boolean(one.cancelled_at);
    stop.setAttribute("aria-label", `Cancel the request for ${one.date}`);
    again.hidden = one.status !== "completed with failures" || Boolean(one.cancelled_at);
    bar.hidden = ended(one);
    if (ended(one)) acted.hidden = true;
    bar.setAttribute("aria-label", `Cities done for ${one.date}`);
    if (counts.cities_total) {
      bar.max = counts.cities_total;
      bar.value = counts.cities_done;
    }
    done.textContent = summaryOf(one);
    failures.hidden = !counts.cities_failed && !one.failed_reason;
    failures.firstElementChild.textContent = one.failed_reason
      ? "Why it failed"
      : `Why ${plural(counts.cities_failed, "city", "cities")} failed`;
    if (failures.open) fillFailures(failures, one.id);
  }
  return row;
}

function summaryOf(one) {
  const { counts } = one;
  const parts = [];
  if (counts.cities_total) {
    parts.push(`${count(counts.cities_done)} of ${plural(counts.cities_total, "city", "cities")}`);
    parts.push(
      ended(one) || counts.bytes_total <= counts.bytes_done
        ? bytes(counts.bytes_done)
        : `${bytes(counts.bytes_done)} of ${bytes(counts.bytes_total)} begun`,
    );
    parts.push(plural(counts.trips_done, "trip"));
    if (counts.cities_unchanged) parts.push(`${count(counts.cities_unchanged)} unchanged`);
    if (counts.cities_skipped) parts.push(`${count(counts.cities_skipped)} skipped`);
    if (counts.cities_failed) parts.push(`${count(counts.cities_failed)} failed`);
  }
  parts.push(`requested ${instant(one.requested_at)}`);
  return parts.join(" · ");
}

async function fillFailures(details, id) {
  const place = details.lastElementChild;
  if (!place.hasChildNodes()) place.append(element("p", { class: "loading" }, "Reading…"));
  try {
    const { failures, counts, failed_reason: reason, bad_cities: bad, bad_cities_count: badCount } = await request(id);
    const item = (name, why, kept) =>
      element("li", {}, element("strong", {}, name), `: ${why}`, kept ? element("p", { class: "kept" }, "The file is kept at ", element("code", {}, kept)) : "");
    place.replaceChildren(
      reason ? element("p", {}, reason) : "",
      element("ul", {}, failures.map((one) => item(`${one.city_name || "city"} (${one.city_id})`, one.reason, one.quarantine_key))),
      counts.cities_failed > failures.length ? element("p", {}, `and ${count(counts.cities_failed - failures.length)} more`) : "",
      badCount ? element("p", {}, `${plural(badCount, "entry", "entries")} of the upstream's city list could not be used:`) : "",
      element("ul", {}, bad.map((one) => item(one.entry, one.reason))),
    );
  } catch (problem) {
    place.replaceChildren(notice("error", problem.title ?? "The request failed", problem.message));
  }
}
