// The measures of the statistics, and their values in words. Pure.

import { count, delay, signed } from "../format.js";

const DEPARTURES = 1000;

export const MEASURES = {
  delay: { name: "Average delay", kind: "time", of: (sums) => sums.average_delay_s },
  passengers: { name: "Passengers", kind: "count", of: (sums) => sums.passenger_count },
  departures: { name: "Departures", kind: "count", of: (sums) => sums.bus_count },
  accidents: { name: "Accidents", kind: "count", of: (sums) => sums.accident_count },
};

/** Whether a measure can be shown per 1,000 departures. */
export const hasRate = (key) => key === "passengers" || key === "accidents";

/** The measure of a key. With `rate`, it is divided by the departures if that makes sense. */
export function measureOf(key, rate = false) {
  const measure = MEASURES[key];
  if (!rate || !hasRate(key)) return measure;
  return {
    name: `${measure.name} per ${count(DEPARTURES)} departures`,
    kind: "rate",
    of: (sums) => (sums.bus_count ? (DEPARTURES * measure.of(sums)) / sums.bus_count : 0),
  };
}

const WORDS = {
  time: delay,
  count,
  rate: (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 2 : 1 }),
};

/** A value of a measure in words. */
export const words = (measure, value) => WORDS[measure.kind](value);

/**
 * The unit of a map or a chart: one for all its values, so that they compare at a glance. `size` is the number of seconds,
 * departures and so on in one unit; `show` and `bound` write a value and a round limit, without the unit.
 */
export function unitOf({ kind }, values) {
  const typical = median(values.map(Math.abs).filter((value) => value > 0));
  if (kind === "time") return typical < 120 ? unit("s", 1, typical < 10 ? 1 : 0) : unit("min", 60, 1);
  if (kind === "rate") return unit("", 1, typical < 10 ? 2 : 0);
  if (typical < 10_000) return unit("", 1, 0);
  return typical < 10_000_000 ? unit("thousands", 1_000, 1) : unit("millions", 1_000_000, 1);
}

const bounds = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });

function unit(name, size, digits) {
  const format = new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return {
    name,
    size,
    show: (value) => signed(value / size, format.format(value / size)),
    bound: (value) => signed(value / size, bounds.format(value / size)),
  };
}

/** The median of numbers; 0 without any. */
export function median(values) {
  const sorted = Float64Array.from(values).sort();
  const middle = sorted.length >> 1;
  if (!sorted.length) return 0;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
