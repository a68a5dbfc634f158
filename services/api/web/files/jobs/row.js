// The row of a job: its progress, its failures, and what can be done.

import { backfill, cancel, cancelBackfill, changeBackfill, request, retry } from "../api.js";
import { button, element } from "../dom.js";
import { count, days, plural } from "../format.js";
import { problemNotice } from "../problems.js";
import { MARKS, summaryOf } from "./jobs.js";

const ACTIONS = {
  pause: { text: "Pause", told: "Pausing. Dates under way end normally.", backfill: (id) => changeBackfill(id, "pause") },
  resume: { text: "Resume", told: "Resuming.", backfill: (id) => changeBackfill(id, "resume") },
  retry: { text: "Retry the failed cities", told: "Retrying.", request: retry, backfill: (id) => changeBackfill(id, "retry") },
  cancel: { text: "Cancel", told: "Cancelling. Cities already in progress finish normally.", request: cancel, backfill: cancelBackfill },
};

/** A row. `show(job)` updates it. Calls `onchange()` after an action. */
export function jobRow(onchange) {
  const mark = element("span", { class: "mark", "aria-hidden": "true" });
  const title = element("strong");
  const status = element("span", { class: "status" });
  const buttons = element("span", { class: "buttons" });
  const bar = element("progress");
  const summary = element("p", { class: "done" });
  const failures = element("details", { hidden: true }, element("summary"), element("div"));
  const told = element("div", { role: "status" });
  const item = element("li", {}, element("p", { class: "title" }, mark, title, status, buttons), bar, summary, failures, told);
  let shown = null;

  failures.addEventListener("toggle", () => failures.open && fill(failures.lastElementChild, shown));

  function show(job) {
    if (shown?.version === job.version && shown.text === job.text) return;
    shown = job;
    item.className = job.status.replaceAll(" ", "-");
    mark.textContent = MARKS[job.status] ?? "…";
    title.textContent = job.title;
    status.textContent = job.text;
    bar.hidden = !job.open;
    bar.setAttribute("aria-label", `${job.kind === "request" ? "Cities" : "Dates"} done of ${job.title}`);
    if (job.total) {
      bar.max = job.total;
      bar.value = job.done;
    }
    summary.textContent = summaryOf(job);
    if (!job.open) told.replaceChildren();
    buttons.replaceChildren(...job.actions.map((action) => actionButton(action, job)));
    failures.hidden = !job.failures;
    failures.firstElementChild.textContent = job.failures;
    if (failures.open) fill(failures.lastElementChild, job);
  }

  function actionButton(action, job) {
    const { text, told: message, [job.kind]: send } = ACTIONS[action];
    const pressed = button(text, act, { "aria-label": `${text}: ${job.title}` });
    return pressed;

    async function act() {
      pressed.disabled = true;
      try {
        await send(job.id);
        told.replaceChildren(element("p", {}, message));
      } catch (problem) {
        told.replaceChildren(problemNotice(problem));
        pressed.disabled = false;
      }
      onchange();
    }
  }

  return { item, show };
}

async function fill(place, { kind, id }) {
  if (!place.hasChildNodes()) place.append(element("p", { class: "loading" }, "Reading…"));
  try {
    place.replaceChildren(...(kind === "request" ? failuresOf(await request(id)) : failedDates(await backfill(id))));
  } catch (problem) {
    place.replaceChildren(problemNotice(problem));
  }
}

function failuresOf({ failures, counts, failed_reason: reason, bad_cities: bad, bad_cities_count: badCount }) {
  const line = (name, why, kept) =>
    element("li", {}, element("strong", {}, name), `: ${why}`, kept ? element("p", { class: "kept" }, "The file is kept at ", element("code", {}, kept)) : "");
  return [
    reason ? element("p", {}, reason) : "",
    element("ul", {}, failures.map((one) => line(`${one.city_name || "city"} (${one.city_id})`, one.reason, one.quarantine_key))),
    counts.cities_failed > failures.length ? element("p", {}, `and ${count(counts.cities_failed - failures.length)} more`) : "",
    badCount ? element("p", {}, `${plural(badCount, "entry", "entries")} of the upstream's city list could not be used:`) : "",
    element("ul", {}, bad.map((one) => line(one.entry, one.reason))),
  ];
}

// The failures of a date are read when it is opened.
function failedDates({ failed, counts }) {
  return [
    ...failed.map(({ date, request_id: id }) => {
      const details = element("details", {}, element("summary", {}, days(date, date)), element("div"));
      details.addEventListener("toggle", () => details.open && fill(details.lastElementChild, { kind: "request", id }));
      return details;
    }),
    counts.dates_failed > failed.length ? element("p", {}, `and ${count(counts.dates_failed - failed.length)} more`) : "",
  ];
}
