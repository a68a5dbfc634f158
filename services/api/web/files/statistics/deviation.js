// Finds unusual days: those far from the median of the same weekday in the weeks before. Pure.
//
// The distance is measured in robust standard deviations of the country's days from those medians, so an earlier outlier
// neither hides nor causes another one. Provisional days are left out: files are missing, so their numbers are low anyway.

import { MEASURES, median, words } from "./measures.js";

export const HISTORY_DAYS = 56;

const WEEK = 7;
const DAYS_COMPARED_MIN = 4;
const SCORE_MIN = 4;
const SHARE_OF_NOISE = 0.05; // a stable past does not make a deviation of a few percent unusual
const TO_STANDARD_DEVIATION = 1.4826; // from the median absolute deviation, for a normal distribution

const perDeparture = (day) => (day.bus_count ? day.passenger_count / day.bus_count : 0);
const decimal = (value) => value.toLocaleString("en", { maximumFractionDigits: 1 });

/** The measures that are watched. Passengers are watched per departure: fewer departures carry fewer of them. */
export const WATCHED = [
  { measure: "delay", of: MEASURES.delay.of, noun: "delay", value: (value) => words(MEASURES.delay, value), noise: () => 1 },
  { measure: "departures", of: MEASURES.departures.of, noun: "departures", value: decimal, noise: Math.sqrt },
  { measure: "passengers", of: perDeparture, noun: "passengers per departure", value: decimal, noise: () => 0.1 },
  { measure: "accidents", of: MEASURES.accidents.of, noun: "accidents", value: decimal, noise: (usual) => Math.sqrt(Math.max(1, usual)) },
];

/** The unusual runs of days of a country. `earlier` has the days before its days. Each run has a score. */
export function unusualRuns(country, earlier) {
  const days = [...earlier, ...country.days];
  return WATCHED.flatMap((watched) => {
    const found = deviations(days, watched).slice(earlier.length);
    return runsOf(found).map((run) => ({ country, watched, ...run }));
  });
}

/** The deviation of each day from its usual value; null for a day that is usual, or whose past is not known. */
export function deviations(days, { of, noise }) {
  const usual = days.map((day, at) => (day.standing === "complete" ? usualValue(days, at, of) : null));
  const distances = days.flatMap((day, at) => (usual[at] === null ? [] : [Math.abs(of(day) - usual[at])]));
  const spread = TO_STANDARD_DEVIATION * median(distances);
  return days.map((day, at) => {
    if (usual[at] === null) return null;
    const unit = Math.max(spread, SHARE_OF_NOISE * Math.abs(usual[at]), noise(usual[at]));
    const score = (of(day) - usual[at]) / unit;
    return Math.abs(score) < SCORE_MIN ? null : { day, value: of(day), usual: usual[at], score };
  });
}

function usualValue(days, at, of) {
  const before = [];
  for (let place = at - WEEK; place >= Math.max(0, at - HISTORY_DAYS); place -= WEEK) {
    if (days[place].standing === "complete") before.push(of(days[place]));
  }
  return before.length < DAYS_COMPARED_MIN ? null : median(before);
}

// Days that follow each other and deviate in the same direction are one run, with the score of its strongest day.
function runsOf(found) {
  const runs = [];
  let last = null;
  for (const one of found) {
    if (one && last && Math.sign(one.score) === Math.sign(last.score)) runs.at(-1).push(one);
    else if (one) runs.push([one]);
    last = one;
  }
  return runs.map((run) => ({
    from: run[0].day.date,
    to: run.at(-1).day.date,
    value: mean(run.map(({ value }) => value)),
    usual: mean(run.map(({ usual }) => usual)),
    score: Math.max(...run.map(({ score }) => Math.abs(score))),
  }));
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** What is unusual about a run, in words: `3.5 times its usual delay`. */
export function deviationInWords({ watched: { measure, noun, value: inWords }, value, usual }) {
  const isDelay = measure === "delay";
  if (usual <= 0) return isDelay ? `a delay of ${inWords(value)}` : `${inWords(value)} ${noun}`;
  const ratio = value / usual;
  if (ratio >= 1.95) return isDelay ? `${ratio.toFixed(1)} times its usual delay` : `${ratio.toFixed(1)} times as many ${noun} as usual`;
  const percent = `${Math.round(Math.abs(ratio - 1) * 100)} %`;
  if (ratio > 1) return `${percent} more ${noun} than usual`;
  return `${percent} ${isDelay ? "less" : "fewer"} ${noun} than usual`;
}

/** The values behind a run, in words: `4 min 5 s instead of 1 min 10 s`. */
export const valuesInWords = ({ watched, value, usual }) => `${watched.value(value)} instead of ${watched.value(usual)}`;
