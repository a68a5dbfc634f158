// Says of days without data, or with missing cities, why that is and what to do.

import { completeness } from "../api.js";

/** Give each incomplete day its `state`, `reason` and `action`. Returns whether any of them is new. */
export async function explain({ countries }, range, signal) {
  const incomplete = countries.flatMap((country) => country.days.filter(({ standing }) => standing !== "complete").map((day) => [country.slug, day]));
  if (!incomplete.length) return false;
  const { body } = await completeness(range, { signal });
  const bySlug = new Map(body.countries.map(({ country, days }) => [country, new Map(days.map((day) => [day.date, day]))]));
  let isNew = false;
  for (const [slug, day] of incomplete) {
    const { state, reason, action } = bySlug.get(slug)?.get(day.date) ?? {};
    isNew ||= day.state !== state || day.reason !== reason;
    Object.assign(day, { state, reason, action });
  }
  return isNew;
}
