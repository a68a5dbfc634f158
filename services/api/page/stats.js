// What the statistics say, ready to be shown. Pure: no element, no request, no clock.

import { count, delay, plural, short, shortDelay } from "./format.js";

export const MEASURES = {
  delay: { name: "Average delay", of: (day) => day.average_delay_s, long: delay, short: shortDelay },
  passengers: { name: "Passengers", of: (day) => day.passenger_count, long: count, short },
  buses: { name: "Buses", of: (day) => day.bus_count, long: count, short },
  accidents: { name: "Accidents", of: (day) => day.accident_count, long: count, short },
};

export const COLOURS = 7;

/** How a day stands: `complete`, `provisional` (cities are missing), or `none` (nothing was taken in). */
export function standing(day) {
  if (day.last_ingested_at === null) return "none";
  return day.complete ? "complete" : "provisional";
}

/** Arrange an answer of the API: countries by name, each with its days in order and its totals. */
export function arranged(answer) {
  const countries = Object.entries(answer).map(([slug, byDate]) => {
    const days = Object.entries(byDate).map(([date, day]) => ({ date, ...day, standing: standing(day) }));
    return { slug, name: days.at(-1)?.country_name ?? slug, days, total: total(days) };
  });
  countries.sort((one, other) => one.name.localeCompare(other.name, "en"));
  return { countries, dates: countries[0]?.days.map((day) => day.date) ?? [], total: total(countries.flatMap((country) => country.days)) };
}

/** Add days up. Sums are of integers, and the average is of the sums: exact, like the days themselves. */
export function total(days) {
  const sum = (field) => days.reduce((all, day) => all + day[field], 0);
  const buses = sum("bus_count");
  return {
    bus_count: buses,
    passenger_count: sum("passenger_count"),
    accident_count: sum("accident_count"),
    average_delay_s: buses ? sum("delay_total_ms") / buses / 1000 : 0,
    complete: days.filter((day) => day.standing === "complete").length,
    provisional: days.filter((day) => day.standing === "provisional").length,
    none: days.filter((day) => day.standing === "none").length,
  };
}

/** Where the colours of a scale meet: at most six values, so that each colour has about as many days. */
export function thresholds(values) {
  const sorted = Float64Array.from(values).sort();
  if (sorted.length === 0 || sorted[0] === sorted.at(-1)) return [];
  const range = sorted.at(-1) - sorted[0];
  const step = 10 ** Math.floor(Math.log10(range / 20));
  const met = [];
  for (let part = 1; part < COLOURS; part += 1) {
    const value = sorted[Math.floor((part * sorted.length) / COLOURS)];
    const rounded = Number((Math.round(value / step) * step).toPrecision(12));
    if (rounded > sorted[0] && rounded <= sorted.at(-1) && rounded !== met.at(-1)) met.push(rounded);
  }
  return met;
}

/** The colour of a value: spread over all seven when there are fewer steps. */
export function colour(value, met) {
  const place = met.filter((threshold) => value >= threshold).length;
  return met.length ? Math.round((place * (COLOURS - 1)) / met.length) : 3;
}

/** How complete a day is, in words. */
export function completeness(day) {
  if (day.standing === "complete") return `complete: ${plural(day.cities_expected, "city", "cities")}`;
  if (day.standing === "provisional") {
    return day.cities_expected
      ? `provisional: ${count(day.cities_reported)} of ${plural(day.cities_expected, "city", "cities")}`
      : "provisional: its plan is not known yet";
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
