// Jobs: requests of single dates, and backfills of ranges, in one form. Pure.

import { bytes, count, days, instant, plural } from "../format.js";

const ENDED = new Set(["completed", "completed with failures", "failed", "cancelled"]);
export const STATUSES = ["accepted", "planned", "running", "paused", "completed", "completed with failures", "failed", "cancelled"];
export const MARKS = { completed: "✓", "completed with failures": "!", failed: "✕", cancelled: "–", paused: "‖" };

/** A request as a job. */
export function requestJob(one) {
  const { counts } = one;
  const open = !ENDED.has(one.status);
  return {
    kind: "request",
    id: one.id,
    from: one.date,
    to: one.date,
    title: days(one.date, one.date),
    status: one.status,
    text: one.cancelled_at && open ? `${one.status}, being cancelled` : one.status,
    at: one.requested_at,
    version: one.version,
    open,
    done: counts.cities_done,
    total: counts.cities_total,
    leftMs: open ? leftMs(one.requested_at, one.updated_at, counts.cities_done, counts.cities_total) : null,
    facts: requestFacts(one, open),
    failures: counts.cities_failed ? `Why ${plural(counts.cities_failed, "city", "cities")} failed` : one.failed_reason ? "Why it failed" : "",
    actions: [open && !one.cancelled_at && "cancel", !open && !one.cancelled_at && (counts.cities_failed || one.status === "failed") && "retry"].filter(Boolean),
  };
}

function requestFacts(one, open) {
  const { counts } = one;
  if (!counts.cities_total) return [];
  return [
    `${count(counts.cities_done)} of ${plural(counts.cities_total, "city", "cities")}`,
    open && counts.bytes_total > counts.bytes_done ? `${bytes(counts.bytes_done)} of ${bytes(counts.bytes_total)} begun` : bytes(counts.bytes_done),
    plural(counts.trips_done, "trip"),
    counts.cities_unchanged && `${count(counts.cities_unchanged)} unchanged`,
    counts.cities_skipped && `${count(counts.cities_skipped)} skipped`,
    counts.cities_failed && `${count(counts.cities_failed)} failed`,
  ].filter(Boolean);
}

/** A backfill as a job. */
export function backfillJob(one) {
  const { counts } = one;
  const done = counts.dates_completed + counts.dates_failed + counts.dates_skipped + counts.dates_cancelled;
  const running = !ENDED.has(one.status);
  return {
    kind: "backfill",
    id: one.id,
    from: one.from,
    to: one.to,
    title: days(one.from, one.to),
    status: one.status,
    text: !running && counts.dates_under_way ? `${one.status}, ${plural(counts.dates_under_way, "date")} under way` : one.status,
    at: one.created_at,
    version: one.version,
    open: running || counts.dates_under_way > 0,
    done,
    total: counts.dates_total,
    leftMs: one.estimated_end ? Math.max(0, Date.parse(one.estimated_end) - Date.parse(one.updated_at)) : null,
    facts: [
      `${count(done)} of ${plural(counts.dates_total, "date")}`,
      counts.dates_under_way && `${count(counts.dates_under_way)} under way`,
      counts.dates_skipped && `${count(counts.dates_skipped)} skipped`,
      counts.dates_failed && `${count(counts.dates_failed)} failed`,
      counts.dates_cancelled && `${count(counts.dates_cancelled)} cancelled`,
      one.schedule && `schedule ${one.schedule}`,
      one.source === "bucket" && "reads stored files again",
    ].filter(Boolean),
    failures: counts.dates_failed ? `Which ${plural(counts.dates_failed, "date")} failed` : "",
    actions: [
      one.status === "running" && "pause",
      one.status === "paused" && "resume",
      running && "cancel",
      counts.dates_failed && one.status !== "cancelled" && "retry",
    ].filter(Boolean),
  };
}

// At the speed since the beginning. Unknown before the first part is done.
function leftMs(from, to, done, total) {
  const elapsed = Date.parse(to) - Date.parse(from);
  return done && elapsed > 0 ? (elapsed * (total - done)) / done : null;
}

/** A time in words: `about 3 min left`. */
export function left(ms) {
  if (ms === null) return "";
  const minutes = Math.ceil(ms / 60_000);
  if (minutes < 120) return `about ${plural(minutes, "min", "min")} left`;
  return minutes < 2_880 ? `about ${plural(Math.round(minutes / 60), "hour")} left` : `about ${plural(Math.round(minutes / 1_440), "day")} left`;
}

/** The line below the title of a job. */
export const summaryOf = (job) => [...job.facts, left(job.leftMs), `requested ${instant(job.at)}`].filter(Boolean).join(" · ");

/** The jobs that a filter leaves: with a status, and with a date. Newest first. */
export function filtered(jobs, { status, date }) {
  const found = jobs.filter((job) => (!status || job.status === status) && (!date || (job.from <= date && date <= job.to)));
  return found.sort((one, other) => (one.at === other.at ? (one.id < other.id ? 1 : -1) : one.at < other.at ? 1 : -1));
}

/** How many jobs are in each status, in words. */
export function totals(jobs) {
  const counts = STATUSES.map((status) => [status, jobs.filter((job) => job.status === status).length]);
  return [plural(jobs.length, "job"), ...counts.filter(([, number]) => number).map(([status, number]) => `${count(number)} ${status}`)].join(" · ");
}
