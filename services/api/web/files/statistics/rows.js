// Chooses and sorts the countries of a view. Pure.

import { byName } from "../format.js";
import { totalChange } from "./compare.js";

export const ORDERS = { name: "Name", value: "Value", change: "Change" };

/** The countries whose name or slug contains a text. Case and accents do not matter. */
export function foundIn(countries, text) {
  const wanted = plain(text.trim());
  return wanted ? countries.filter(({ name, slug }) => plain(name).includes(wanted) || slug.includes(wanted)) : countries;
}

const plain = (text) => text.normalize("NFD").replace(/\p{Mark}/gu, "").toLowerCase();

/** The countries in an order: by name, or the greatest value or change first. Unknown changes come last. */
export function inOrder(countries, order, measure, comparison) {
  if (order === "name" || (order === "change" && !comparison)) return countries.toSorted((one, other) => byName(one.name, other.name));
  const keyOf = (country) => (order === "value" ? measure.of(country.total) : (totalChange(comparison, measure, country) ?? -Infinity));
  const keyed = countries.map((country) => ({ country, key: keyOf(country) }));
  keyed.sort((one, other) => (one.key === other.key ? byName(one.country.name, other.country.name) : other.key - one.key));
  return keyed.map(({ country }) => country);
}
