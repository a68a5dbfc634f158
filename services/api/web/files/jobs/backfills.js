// The open backfills with their progress, and the dates of schedules that are late.

import { cancelBackfill, latestBackfills, schedules } from "../api.js";
import { button, element, notice } from "../dom.js";
import { count, instant, plural } from "../format.js";

const LISTED = 20;
const POLL_UNDER_WAY_MS = 2_000;
const POLL_IDLE_MS = 15_000;
const OPEN = new Set(["running", "paused"]);

const open = (one) => OPEN.has(one.status) || one.counts.dates_under_way > 0;

/** Show the open backfills and the late dates. Returns `start()` and `stop()`, which begin and end the updates. */
export function watchBackfills() {
  const place = document.getElementById("backfills");
  let timer = null;
  let stopped = true;

  async function look() {
    clearTimeout(timer);
    let wait = POLL_IDLE_MS;
    try {
      const [listed, late] = [(await latestBackfills(LISTED)).filter(open), lateDates(await schedules())];
      place.replaceChildren(
        ...late.map(({ name, dates }) =>
          notice("late", `${plural(dates.length, "date")} of schedule ${name} ${dates.length === 1 ? "is" : "are"} late`, dates.join(", ")),
        ),
        listed.length ? element("ul", { class: "requests" }, listed.map((one) => rowOf(one, look))) : "",
      );
      if (listed.length) wait = POLL_UNDER_WAY_MS;
    } catch {
      // The list of requests below shows the problem.
    }
    clearTimeout(timer);
    if (!stopped) timer = setTimeout(look, wait);
  }

  function start() {
    stopped = false;
    look();
  }

  function stop() {
    stopped = true;
    clearTimeout(timer);
  }

  return { start, stop };
}

const lateDates = (all) => all.map(({ name, late }) => ({ name, dates: late.map((one) => one.date) })).filter(({ dates }) => dates.length);

function rowOf(one, onchange) {
  const { counts } = one;
  const range = one.from === one.to ? one.from : `${one.from} to ${one.to}`;
  const done = counts.dates_completed + counts.dates_failed + counts.dates_skipped + counts.dates_cancelled;
  const stop = button("Cancel", async () => {
    stop.disabled = true;
    await cancelBackfill(one.id).catch(() => {});
    onchange();
  }, { "aria-label": `Cancel the backfill of ${range}`, hidden: !OPEN.has(one.status) });
  const parts = [`${count(done)} of ${plural(counts.dates_total, "date")}`];
  if (counts.dates_skipped) parts.push(`${count(counts.dates_skipped)} skipped`);
  if (counts.dates_failed) parts.push(`${count(counts.dates_failed)} failed`);
  if (one.estimated_end) parts.push(`until about ${instant(one.estimated_end)}`);
  if (one.schedule) parts.push(`schedule ${one.schedule}`);
  return element(
    "li",
    { class: one.status },
    element("p", { class: "title" }, element("strong", {}, range), element("span", { class: "status" }, one.status), stop),
    element("progress", { max: counts.dates_total, value: done, "aria-label": `Dates done of ${range}` }),
    element("p", { class: "done" }, parts.join(" · ")),
  );
}
