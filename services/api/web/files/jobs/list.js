// The list of jobs: ordered, filtered, with totals, and updated while jobs are open.

import { announce, button, element, notice } from "../dom.js";
import { polling } from "../polling.js";
import { problemNotice } from "../problems.js";
import { filtered, totals } from "./jobs.js";
import { jobRow } from "./row.js";
import { jobSource } from "./source.js";

const POLL_OPEN_MS = 2_000;
const POLL_IDLE_MS = 10_000;
const UPDATE_EVERY = 5; // polls of open jobs

/** The list of jobs in `place`. `filter()` says which are shown. Calls `onended()` when a job has ended. */
export function jobList(place, { filter, onended }) {
  const source = jobSource();
  const rows = new Map();
  const problems = element("div");
  const summary = element("p", { class: "totals" });
  const list = element("ul", { class: "jobs" });
  const empty = element("div");
  const more = button("Show older jobs", readMore);
  const statuses = new Map();
  let polls = 0;
  place.append(problems, summary, list, empty, more);
  more.hidden = true;

  const isOpen = () => source.visible().some((job) => job.open);
  const polled = polling(look, () => (isOpen() ? POLL_OPEN_MS : POLL_IDLE_MS));

  async function look() {
    try {
      if (polls % UPDATE_EVERY === 0 || !isOpen()) await source.update();
      else await source.refresh();
      polls += 1;
      problems.replaceChildren();
      draw();
    } catch (problem) {
      problems.replaceChildren(problemNotice(problem, look));
    }
    place.setAttribute("aria-busy", "false");
  }

  async function readMore() {
    more.disabled = true;
    try {
      await source.more();
      draw();
    } catch (problem) {
      problems.replaceChildren(problemNotice(problem, readMore));
    }
    more.disabled = false;
  }

  function draw() {
    const all = source.visible();
    const jobs = filtered(all, filter());
    for (const job of all) tell(job);
    for (const job of jobs) {
      if (!rows.has(job.id)) rows.set(job.id, jobRow(updateNow));
      rows.get(job.id).show(job);
    }
    const wanted = jobs.map((job) => rows.get(job.id).item);
    const isSame = wanted.length === list.children.length && wanted.every((item, at) => list.children[at] === item);
    if (!isSame) list.replaceChildren(...wanted);
    summary.textContent = totals(jobs) + (source.hasMore() ? " · older ones are not shown" : "");
    summary.hidden = !all.length;
    empty.replaceChildren(emptyNotice(all, jobs));
    more.hidden = !source.hasMore();
  }

  function tell(job) {
    const before = statuses.get(job.id);
    statuses.set(job.id, job.status);
    if (!before || before === job.status || job.open) return;
    announce(`${job.title} is ${job.status}.`);
    onended();
  }

  function updateNow() {
    polls = 0;
    polled.start();
  }

  return { start: polled.start, stop: polled.stop, updateNow, draw };
}

function emptyNotice(all, jobs) {
  if (!all.length) return notice("empty", "No date has been requested yet", "Choose dates above. Their progress appears here.");
  return jobs.length ? "" : notice("empty", "No job matches the filter", "Choose another status or date.");
}
