// The view of jobs: what is processed now, what was processed, which dates are late, and which files were refused.

import { ask, latestRequests, schedules } from "../api.js";
import { element, notice } from "../dom.js";
import { daysIn, moved, plural } from "../format.js";
import { problemNotice } from "../problems.js";
import { requestedRange, todayInUtc } from "../ranges.js";
import { keepInUrl } from "../views.js";
import { STATUSES } from "./jobs.js";
import { jobList } from "./list.js";
import { showQuarantine } from "./quarantine.js";

const LISTED = 20;

const form = document.getElementById("ask");
const asked = document.getElementById("asked");
const filter = document.getElementById("jobs-filter");
const late = document.getElementById("late");

let params = {};
let list = null; // made when the view is opened first
let loading = null;

export const view = { path: "/jobs", title: "Jobs", place: "jobs", open, close };

for (const status of STATUSES) filter.elements.status.append(new Option(status, status));
filter.addEventListener("input", () => {
  params = { ...params, ...Object.fromEntries(new FormData(filter)) };
  keepInUrl(params);
  list.draw();
});
filter.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("submit", request);

function open(opened) {
  params = opened;
  filter.elements.status.value = STATUSES.includes(params.status) ? params.status : "";
  filter.elements.date.value = params.date ?? "";
  loading?.abort();
  loading = new AbortController();
  list ??= jobList(document.getElementById("latest"), { filter: () => Object.fromEntries(new FormData(filter)), onended: () => loading && fill(loading.signal) });
  list.start();
  fill(loading.signal);
}

function close() {
  loading.abort();
  loading = null;
  list.stop();
}

async function fill(signal) {
  const { from, to } = params;
  const { elements } = form;
  let range = { from, to };
  if (from && to) {
    elements.from.value ||= from;
    elements.to.value ||= to;
  } else {
    const requests = await latestRequests(LISTED).catch(() => []); // the list of jobs shows the error
    if (signal.aborted) return;
    range = requestedRange(requests, todayInUtc());
    elements.from.value ||= moved(range.to, requests.length ? 1 : 0);
    elements.to.value ||= elements.from.value;
  }
  showQuarantine(range, signal);
  showLate();
}

async function showLate() {
  try {
    const found = await schedules();
    late.replaceChildren(...found.filter((one) => one.late.length).map(lateNotice));
  } catch (problem) {
    late.replaceChildren(problem.status === 401 ? "" : problemNotice(problem, showLate)); // the list of jobs asks for a key
  }
}

const lateNotice = ({ name, late: dates }) =>
  notice("late", `${plural(dates.length, "date")} of schedule ${name} ${dates.length === 1 ? "is" : "are"} late`, dates.map(({ date }) => date).join(", "));

async function request(event) {
  event.preventDefault();
  const { from, to } = Object.fromEntries(new FormData(form));
  if (!from || !to) {
    asked.replaceChildren(problemNotice({ title: "A date is missing", message: "Enter a first and a last date." }));
    return;
  }
  const send = form.querySelector("button");
  send.disabled = true;
  try {
    await ask(from, to);
    asked.replaceChildren(element("p", {}, `Requested ${plural(daysIn(from, to), "date")}.`));
  } catch (problem) {
    asked.replaceChildren(problemNotice(problem));
  }
  send.disabled = false;
  list.updateNow();
}
