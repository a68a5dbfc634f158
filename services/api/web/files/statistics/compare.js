// Compares a range of days with earlier days. Pure.

import { total } from "./stats.js";

export const COMPARISONS = {
  previous: "the period before",
  weekday: "the same weekdays before",
};

const WEEK = 7;
const WEEKS_MAX = 52; // longer ranges are compared with the year before

/** The number of days between a day and the earlier day of its comparison; 0 without a comparison. */
export function shiftOf(mode, days) {
  if (!mode) return 0;
  return mode === "weekday" ? WEEK * Math.min(WEEKS_MAX, Math.ceil(days / WEEK)) : days;
}

/** The change from one value to another in percent; null if a percentage of the earlier value has no meaning. */
export function changeOf(now, before) {
  if (before === now) return 0;
  return before > 0 ? ((now - before) / before) * 100 : null;
}

/**
 * Pair each day of each country with its earlier day. `earlier` has the days before the range by country slug, all of the
 * same dates; the last one is the day before the range. Totals only count days that have data on both sides.
 */
export function compare(countries, earlier, shift) {
  const bySlug = new Map();
  const all = { now: [], before: [] };
  for (const { slug, days } of countries) {
    const known = earlier.get(slug) ?? [];
    const before = days.map((_, at) => known[known.length - shift + at] ?? null);
    const pairs = days.map((day, at) => [day, before[at]]).filter(([day, other]) => hasData(day) && hasData(other));
    const now = pairs.map(([day]) => day);
    const then = pairs.map(([, other]) => other);
    bySlug.set(slug, { before, total: { now: total(now), before: total(then) }, pairs: pairs.length });
    all.now.push(...now);
    all.before.push(...then);
  }
  return { bySlug, total: { now: total(all.now), before: total(all.before) }, pairs: all.now.length };
}

/** Whether any file of a day was ingested. */
export const hasData = (day) => Boolean(day) && day.standing !== "none";

/** The change of a measure on a day of a country, in percent; null without an earlier day. */
export function dayChange(comparison, measure, country, at) {
  const before = comparison.bySlug.get(country.slug)?.before[at];
  const day = country.days[at];
  return hasData(day) && hasData(before) ? changeOf(measure.of(day), measure.of(before)) : null;
}

/** The change of a measure over the range, in percent: of a country, or of all of them. */
export function totalChange(comparison, measure, country) {
  const { total: sums, pairs } = country ? comparison.bySlug.get(country.slug) : comparison;
  return pairs ? changeOf(measure.of(sums.now), measure.of(sums.before)) : null;
}
