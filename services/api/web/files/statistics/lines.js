// A line chart as SVG, with a line for each selected country. The tables have the same numbers.

import { drawn, element, hideHint, showHint } from "../dom.js";
import { dayAndMonth, monthAndYear, signed } from "../format.js";
import { words } from "./measures.js";
import { completeness } from "./stats.js";

export const LINES_MAX = 8;
const HEIGHT = 260;
const MARGIN = { top: 12, right: 14, bottom: 26, left: 84 };
const TICKS_MAX = 6;
const LABEL_WIDTH = 84;
const DAYS_BY_DAY_MAX = 92;
const DAYS_WITH_DOTS_MAX = 45;

/** Draw a measure of some countries by day. Redraws the chart when its width changes. */
export function lines(countries, dates, measure) {
  const place = element("div", { class: "chart" });
  const readout = element("output", { class: "readout" });
  let day = null;
  const draw = () => {
    const width = Math.max(280, Math.floor(place.clientWidth));
    place.replaceChildren(chart(countries, dates, measure, width));
    point(day);
  };
  const point = (at) => {
    const mark = place.querySelector(".crosshair");
    day = at;
    mark?.toggleAttribute("hidden", at === null);
    if (at === null || !mark) return;
    const x = across(at, dates.length, place.clientWidth);
    mark.setAttribute("d", `M${x} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}`);
  };
  const words = (at) =>
    [dates[at], ...countries.map((country) => `${country.name}: ${value(country.days[at], measure)}`)].join("\n");
  place.addEventListener("pointermove", (event) => {
    const { left, width } = place.getBoundingClientRect();
    const inside = width - MARGIN.left - MARGIN.right;
    const at = Math.round(((event.clientX - left - MARGIN.left) / inside) * (dates.length - 1));
    point(Math.min(dates.length - 1, Math.max(0, at || 0)));
    showHint(words(day), event.clientX, event.clientY);
  });
  place.addEventListener("pointerleave", () => {
    point(null);
    hideHint();
  });
  place.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -dates.length, End: dates.length };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const from = day ?? (steps[event.key] > 0 ? -1 : dates.length);
    point(Math.min(dates.length - 1, Math.max(0, from + steps[event.key])));
    readout.textContent = words(day);
  });
  place.addEventListener("focusout", () => {
    point(null);
    readout.textContent = "";
  });
  new ResizeObserver(draw).observe(place);
  return element(
    "div",
    {},
    element(
      "ul",
      { class: "legend" },
      countries.map((country, order) =>
        element("li", {}, drawn("svg", { viewBox: "0 0 28 8", width: 28, height: 8, "aria-hidden": "true" },
          drawn("path", { class: `line l${order}`, d: "M0 4H28" })), country.name),
      ),
      element("li", {}, drawn("svg", { viewBox: "0 0 8 8", width: 9, height: 9, "aria-hidden": "true" },
        drawn("circle", { class: "dot open", cx: 4, cy: 4, r: 3 })), "provisional"),
    ),
    place,
    readout,
  );
}

function value(day, measure) {
  if (day.standing === "none") return "no data";
  const text = words(measure, measure.of(day));
  return day.standing === "complete" ? text : `${text} (${completeness(day)})`;
}

function across(at, days, width) {
  const inside = width - MARGIN.left - MARGIN.right;
  return days === 1 ? MARGIN.left + inside / 2 : MARGIN.left + (inside * at) / (days - 1);
}

function chart(countries, dates, measure, width) {
  const { of, name, kind } = measure;
  const known = countries.flatMap(({ days }) => days.filter((day) => day.standing !== "none").map(of));
  const scale = ticksOf(known, kind);
  const mark = markOf(measure, scale);
  const x = (at) => across(at, dates.length, width);
  const y = (amount) =>
    HEIGHT - MARGIN.bottom - ((amount - scale[0]) / (scale.at(-1) - scale[0])) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const labels = labelsOf(dates, Math.max(2, Math.floor((width - MARGIN.left) / LABEL_WIDTH)));
  const anchor = (at) => (dates.length > 1 && x(at) > width - LABEL_WIDTH / 2 ? "end" : "middle");
  return drawn(
    "svg",
    {
      viewBox: `0 0 ${width} ${HEIGHT}`,
      width,
      height: HEIGHT,
      tabindex: 0,
      role: "group",
      "aria-label": `${name} from ${dates[0]} to ${dates.at(-1)}: a line for each of ${countries
        .map((country) => country.name)
        .join(", ")}. Left and right read the days.`,
    },
    scale.map((tick) => [
      drawn("path", { class: "gridline", d: `M${MARGIN.left} ${y(tick)}H${width - MARGIN.right}` }),
      drawn("text", { class: "tick", x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, mark(tick)),
    ]).flat(),
    labels
      .map(({ at, text }) => [
        drawn("path", { class: "gridline", d: `M${x(at)} ${HEIGHT - MARGIN.bottom}v4` }),
        drawn("text", { class: "tick", x: x(at), y: HEIGHT - 6, "text-anchor": anchor(at) }, text),
      ])
      .flat(),
    countries.map((country, order) => line(country, order, of, x, y)).flat(),
    drawn("path", { class: "crosshair", hidden: true }),
  );
}

function line({ days }, order, of, x, y) {
  let path = "";
  let before = false;
  const dots = [];
  days.forEach((day, at) => {
    const there = day.standing !== "none";
    if (there) {
      path += `${before ? "L" : "M"}${x(at).toFixed(1)} ${y(of(day)).toFixed(1)}`;
      const alone = !before && (days[at + 1]?.standing ?? "none") === "none";
      if (days.length <= DAYS_WITH_DOTS_MAX || alone || day.standing === "provisional") {
        const open = day.standing === "provisional" ? " open" : "";
        dots.push(drawn("circle", { class: `dot l${order}${open}`, cx: x(at), cy: y(of(day)), r: 3 }));
      }
    }
    before = there;
  });
  return [drawn("path", { class: `line l${order}${days.length > DAYS_BY_DAY_MAX ? " thin" : ""}`, d: path }), ...dots];
}

// The marks of an axis are in one unit, the largest that needs no fractions for the step.
function markOf(measure, ticks) {
  if (measure.kind !== "time") return words.bind(null, measure);
  const [size, unit] = UNITS_OF_TIME.find(([seconds]) => ticks.every((tick) => tick % seconds === 0)) ?? [1, "s"];
  return (tick) => `${signed(tick, String(Number((Math.abs(tick) / size).toPrecision(6))))} ${unit}`;
}

const UNITS_OF_TIME = [[3600, "h"], [60, "min"]];

function ticksOf(values, kind) {
  const inTime = kind === "time";
  let [low, high] = values.length ? [values[0], values[0]] : [0, 1];
  for (const one of values) {
    low = Math.min(low, one);
    high = Math.max(high, one);
  }
  if (!inTime) low = Math.min(0, low);
  if (low === high) high = low + 1;
  const step = stepOf((high - low) / TICKS_MAX, kind);
  const first = Math.floor(low / step);
  const last = Math.ceil(high / step);
  return Array.from({ length: last - first + 1 }, (_, place) => Number(((first + place) * step).toPrecision(12)));
}

// A round step of at least `least`: a whole number for counts, a fraction or multiple of minutes for times.
function stepOf(least, kind) {
  const power = 10 ** Math.floor(Math.log10(least));
  const decimal = [1, 2, 5, 10].find((factor) => factor * power >= least) * power;
  if (kind === "rate") return decimal;
  if (kind === "count") return Math.max(1, decimal);
  return least > 10 ? (STEPS_OF_TIME_S.find((step) => step >= least) ?? decimal) : decimal;
}

const STEPS_OF_TIME_S = [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400];

// Labels at even distances: days, or the first days of months in a longer range.
function labelsOf(dates, most) {
  if (dates.length <= DAYS_BY_DAY_MAX) {
    const step = [1, 2, 3, 4, 5, 7, 10, 14, 21, 28].find((days) => dates.length / days <= most) ?? 46;
    return dates.map((date, at) => ({ at, text: dayAndMonth(date) })).filter(({ at }) => at % step === 0);
  }
  const firsts = dates.map((date, at) => ({ at, text: monthAndYear(date), date })).filter(({ date }) => date.endsWith("-01"));
  const step = [1, 2, 3, 6, 12, 24, 60, 120].find((months) => firsts.length / months <= most) ?? 240;
  return firsts.filter((_, place) => place % step === 0);
}
