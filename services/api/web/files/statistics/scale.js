// The colours of a map: from its values to classes of the style sheet. Pure.
//
// Values far from the others would coarsen the steps of all. So the steps cover the usual values only, and the others get
// the classes `low` and `high`. With `zeroApart`, zero has the class `zero`, and the steps grow by a factor if the values
// spread over more than one order of magnitude.

export const COLOURS = 7;

const STEPS_MAX = COLOURS - 1;
const FENCE = 3; // interquartile ranges beyond a quartile: Tukey's "far out"
const VALUES_WITH_FENCES_MIN = 8;
const SPREAD_OF_FACTORS_MIN = 20;
const ROUND = [1, 2, 3, 5, 10];
const ROUND_TIMES_S = [1, 2, 3, 5, 10, 15, 20, 30, 60, 90, 120, 180, 240, 300, 600, 900, 1200, 1800, 3600, 7200, 14_400, 86_400];

/**
 * The scale of values: the round limits between its steps, the lowest and the highest usual value, and whether there are
 * values beyond them.
 */
export function scaleOf(values, { zeroApart = false, kind = "count" } = {}) {
  const { low, high, isByFactor } = usual(values, zeroApart);
  return {
    zeroApart,
    low,
    high,
    steps: isByFactor ? factorSteps(low, high) : evenSteps(low, high, kind),
    hasZero: zeroApart && values.includes(0),
    hasLow: values.some((value) => value < low && !(zeroApart && value === 0)),
    hasHigh: values.some((value) => value > high),
  };
}

/** The scale of one country's values: even steps from its lowest to its highest usual value. */
export function ownScaleOf(values, { zeroApart = false } = {}) {
  const { low, high } = usual(values, zeroApart);
  const steps = Array.from({ length: STEPS_MAX }, (_, place) => low + ((high - low) * (place + 1)) / COLOURS);
  return { zeroApart, low, high, steps: high > low ? steps : [] };
}

/** The class of a value. Fewer steps are spread over all colours. */
export function classOf(value, { zeroApart, low, high, steps }) {
  if (zeroApart && value === 0) return "zero";
  if (value < low) return "low";
  if (value > high) return "high";
  return stepClass(steps.filter((step) => value >= step).length, steps.length);
}

/** The class of the step at a place, from 0, of a scale with so many limits. */
export const stepClass = (place, limits) => `c${limits ? Math.round((place * (COLOURS - 1)) / limits) : 3}`;

export const CHANGE_STEPS = [-50, -20, -5, 5, 25, 100]; // percent; a factor up and the same factor down look alike

/** The class of a change in percent. */
export const changeClassOf = (percent) => `d${CHANGE_STEPS.filter((step) => percent >= step).length}`;

function usual(values, zeroApart) {
  const sorted = Float64Array.from(zeroApart ? values.filter((value) => value > 0) : values).sort();
  if (!sorted.length) return { low: 0, high: 0, isByFactor: false };
  const at = (share) => sorted[Math.floor(share * (sorted.length - 1))];
  const isByFactor = zeroApart && at(0.98) / at(0.02) > SPREAD_OF_FACTORS_MIN;
  const [to, from] = isByFactor ? [Math.log, Math.exp] : [Number, Number];
  const [first, third] = [to(at(0.25)), to(at(0.75))];
  const tight = isByFactor ? Math.log(1.05) : 0.05 * Math.abs(at(0.5));
  const reach = FENCE * Math.max(third - first, tight);
  if (sorted.length < VALUES_WITH_FENCES_MIN || reach === 0) return { low: sorted[0], high: sorted.at(-1), isByFactor };
  const [lowest, highest] = [from(first - reach), from(third + reach)];
  const inside = sorted.filter((value) => value >= lowest && value <= highest);
  return { low: inside[0], high: inside.at(-1), isByFactor };
}

function evenSteps(low, high, kind) {
  if (low === high) return [];
  const least = (high - low) / STEPS_MAX;
  const power = 10 ** Math.floor(Math.log10(least));
  const decimal = ROUND.map((factor) => factor * power).find((step) => step >= least);
  const step = kind === "time" && least > 1 ? (ROUND_TIMES_S.find((one) => one >= least) ?? decimal) : decimal;
  const whole = kind === "count" ? Math.max(1, step) : step;
  const first = Math.floor(low / whole) + 1;
  const last = Math.floor(high / whole);
  return Array.from({ length: last - first + 1 }, (_, place) => Number(((first + place) * whole).toPrecision(12)));
}

// Each step is about the same factor above the one before.
function factorSteps(low, high) {
  const places = Array.from({ length: STEPS_MAX }, (_, place) => (place + 1) / COLOURS);
  const steps = places.map((share) => Number((low * (high / low) ** share).toPrecision(1)));
  return [...new Set(steps)].filter((step) => step > low && step <= high);
}
