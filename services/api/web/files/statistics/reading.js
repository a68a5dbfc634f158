// Reads statistics, and keeps what was read last: unchanged statistics are not sent again, and stay the same object.

import { countryStats, statsPath } from "../api.js";
import { moved } from "../format.js";
import { HISTORY_DAYS } from "./deviation.js";
import { Gathered } from "./stats.js";

const KEPT_MAX = 4;

const kept = new Map(); // statistics and their ETag, by path, the oldest first

/** Read the statistics of a range. */
export async function readStats(range, signal) {
  const path = statsPath(range);
  const known = kept.get(path);
  const gathered = new Gathered();
  const etag = await countryStats(range, { signal, etag: known?.etag }, (days) => gathered.add(days));
  const stats = etag === known?.etag ? known.stats : gathered.arranged();
  kept.delete(path);
  kept.set(path, { etag, stats });
  if (kept.size > KEPT_MAX) kept.delete(kept.keys().next().value);
  return stats;
}

/** The statistics of a range as they were read last; null if they were not. */
export const keptStats = (range) => kept.get(statsPath(range))?.stats ?? null;

/** The days before a range that it is compared with, at least the HISTORY_DAYS that say what is usual. */
export function earlierRange({ from, country }, shift) {
  return { from: moved(from, -Math.max(shift, HISTORY_DAYS)), to: moved(from, -1), country };
}

/** Read the days before a range. An unknown country has none. */
export async function readEarlier(range, signal) {
  try {
    return await readStats(range, signal);
  } catch (problem) {
    if (problem.status === 404) return null;
    throw problem;
  }
}

/** The days of each country of statistics, by slug. */
export const daysBySlug = (stats) => new Map((stats?.countries ?? []).map(({ slug, days }) => [slug, days]));
