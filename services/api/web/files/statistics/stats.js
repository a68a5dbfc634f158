// Adds the statistics up, and says how complete they are. Pure.

import { byName, count, delay, plural } from "../format.js";

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
    countries.sort((one, other) => byName(one.name, other.name));
    return {
      countries,
      dates: countries[0]?.days.map((day) => day.date) ?? [],
      total: total(countries.flatMap(({ days }) => days)),
    };
  }
}

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

/** How complete a day is, in words. */
export function completeness(day) {
  const suspicious = day.cities_suspicious ? `, ${count(day.cities_suspicious)} with a suspicious volume` : "";
  return coverage(day) + suspicious;
}

function coverage(day) {
  if (day.standing === "none" && day.state) return day.reason ? `${day.state} (${day.reason})` : day.state;
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
    `${plural(day.passenger_count, "passenger")}, ${plural(day.bus_count, "departure")}, ` +
    `${plural(day.accident_count, "accident")}; ${completeness(day)}`
  );
}
