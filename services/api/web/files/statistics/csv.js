// The CSV of a view. Pure.

import { dayChange, hasData } from "./compare.js";

// As in the service's formats.py. Names and slugs come from the upstream, and a spreadsheet would run these as formulas.
const FORMULA = /^[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/;

/** The CSV of the countries of a view: a line for each country-day, and with a comparison its earlier day. */
export function csvOf(countries, measure, comparison) {
  const head = ["country", "country_slug", "date", "state", "departures", "passengers", "accidents", "average_delay_s"];
  const compared = ["measure", "value", "compared_date", "compared_value", "change_percent"];
  const lines = countries.flatMap((country) =>
    country.days.map((day, at) => {
      const sums = [day.bus_count, day.passenger_count, day.accident_count, day.average_delay_s];
      const cells = [country.name, country.slug, day.date, day.standing, ...(hasData(day) ? sums : ["", "", "", ""])];
      return comparison ? [...cells, ...comparedCells(country, at, measure, comparison)] : cells;
    }),
  );
  return [comparison ? [...head, ...compared] : head, ...lines].map((cells) => `${cells.map(cell).join(",")}\r\n`).join("");
}

function comparedCells(country, at, measure, comparison) {
  const day = country.days[at];
  const before = comparison.bySlug.get(country.slug).before[at];
  const value = (one) => (hasData(one) ? measure.of(one) : "");
  const change = dayChange(comparison, measure, country, at);
  return [measure.name, value(day), before?.date ?? "", value(before), change === null ? "" : Number(change.toFixed(1))];
}

/** A cell: text that begins like a formula is escaped, numbers stay numbers. */
function cell(value) {
  const text = typeof value === "string" && FORMULA.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
