// Computes the displayed statistics. Pure: no DOM, no requests, no clock.

import { count, delay, plural, roundDelay, secondsOrMore, short, shortDelay } from "../format.js";

export const MEASURES = {
  delay: { name: "Average delay", of: (day) => day.average_delay_s, long: delay, short: shortDelay, mark: roundDelay, bound: secondsOrMore },
  passengers: { name: "Passengers", of: (day) => day.passenger_count, long: count, short, mark: short, bound: short },
  buses: { name: "Buses", of: (day) => day.bus_count, long: count, short, mark: short, bound: short },
  accidents: { name: "Accidents", of: (day) => day.accident_count, long: count, short, mark: short, bound: short },
};

export const COLOURS = 7;

/** The state of a day: `complete`, `provisional` (cities are missing), or `none` (no file was ingested). */
export function standing(day) {
  if (day.last_ingested_at === null) return "none";
  return day.complete ? "complete" : "provisional";
}

/** Collects country-days, which arrive sorted by country and date. */
export class Gathered {
  #bySlug = new Map();

  add(days) {
    for (const day of days) {
      day.standing = standing(day);
      const known = this.#bySlug.get(day.country);
      if (known) known.push(day);
      else this.#bySlug.set(day.country, [day]);
    }
  }

  /** Countries by name, each with its days in order and its totals. */
  arranged() {
    const countries = [...this.#bySlug].map(([slug, days]) => {
      return { slug, name: days.at(-1).country_name, days, total: total(days) };
    });
    countries.sort((one, other) => byName.compare(one.name, other.name));
    return {
      countries,
      dates: countries[0]?.days.map((day) => day.date) ?? [],
      total: total(countries.flatMap(({ days }) => days)),
    };
  }
}

const byName = new Intl.Collator("en");

/** Add days up. All sums are integers, and the average is computed from them, so it is exact. */
export function total(days) {
  const sums = { bus_count: 0, passenger_count: 0, accident_count: 0, complete: 0, provisional: 0, none: 0 };
  let delayMs = 0;
  for (const day of days) {
    sums.bus_count += day.bus_count;
    sums.passenger_count += day.passenger_count;
    sums.accident_count += day.accident_count;
    sums[day.standing] += 1;
    delayMs += day.delay_total_ms;
  }
  return { ...sums, average_delay_s: sums.bus_count ? delayMs / sums.bus_count / 1000 : 0 };
}

/**
 * The limits between the colours of a scale: at most six values, so that each colour has about as many days. A frequent
 * lowest value, such as no accidents, gets its own colour.
 */
export function thresholds(values) {
  const sorted = Float64Array.from(values).sort();
  if (sorted.length === 0 || sorted[0] === sorted.at(-1)) return [];
  const [least] = sorted;
  const range = sorted.at(-1) - least;
  const step = 10 ** Math.floor(Math.log10(range / 20));
  const above = sorted.subarray(sorted.findIndex((value) => value > least));
  const isLowestSeparate = sorted.length - above.length > sorted.length / COLOURS;
  const [spread, parts] = isLowestSeparate ? [above, COLOURS - 1] : [sorted, COLOURS];
  const met = [];
  for (let part = isLowestSeparate ? 0 : 1; part < parts; part += 1) {
    const value = spread[Math.floor((part * spread.length) / parts)];
    const rounded = Number((Math.round(value / step) * step).toPrecision(12));
    const threshold = rounded > least && rounded <= sorted.at(-1) ? rounded : value;
    if (met.length === 0 || threshold > met.at(-1)) met.push(threshold);
  }
  return met;
}

/** The colour of a value. Fewer steps are spread over all seven colours. */
export function colour(value, met) {
  const place = met.filter((threshold) => value >= threshold).length;
  return met.length ? Math.round((place * (COLOURS - 1)) / met.length) : 3;
}

/** How complete a day is, in words. */
export function completeness(day) {
  const suspicious = day.cities_suspicious ? `, ${count(day.cities_suspicious)} with a suspicious volume` : "";
  return coverage(day) + suspicious;
}

function coverage(day) {
  if (day.standing === "complete") return `complete: ${plural(day.cities_expected, "city", "cities")}`;
  if (day.standing === "provisional") {
    return day.cities_expected
      ? `provisional: ${count(day.cities_reported)} of ${plural(day.cities_expected, "city", "cities")}`
      : "provisional: the number of its cities is not known yet";
  }
  return day.cities_expected ? `no data yet: 0 of ${plural(day.cities_expected, "city", "cities")}` : "no data";
}

/** A day in one line. */
export function sentence(country, day) {
  if (day.standing === "none") return `${country.name}, ${day.date}: ${completeness(day)}`;
  return (
    `${country.name}, ${day.date}: average delay ${delay(day.average_delay_s)}, ` +
    `${plural(day.passenger_count, "passenger")}, ${plural(day.bus_count, "bus", "buses")}, ` +
    `${plural(day.accident_count, "accident")}; ${completeness(day)}`
  );
}
