// One line for each chosen country, as SVG. What it shows stands in the tables too.

import { drawn, element, hideHint, showHint } from "./dom.js";
import { MEASURES, completeness } from "./stats.js";

export const LINES_MAX = 8;
const HEIGHT = 260;
const MARGIN = { top: 12, right: 14, bottom: 26, left: 84 };
const TICKS = 4;
const DAYS_WITH_DOTS_MAX = 45;

/** Draw a measure of some countries over the days. It is drawn again whenever its width changes. */
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
  const text = MEASURES[measure].long(MEASURES[measure].of(day));
  return day.standing === "complete" ? text : `${text} (${completeness(day)})`;
}

function across(at, days, width) {
  const inside = width - MARGIN.left - MARGIN.right;
  return days === 1 ? MARGIN.left + inside / 2 : MARGIN.left + (inside * at) / (days - 1);
}

function chart(countries, dates, measure, width) {
  const { of, short, long, name } = MEASURES[measure];
  const known = countries.flatMap(({ days }) => days.filter((day) => day.standing !== "none").map(of));
  const scale = ticksOf(known, measure !== "delay");
  const x = (at) => across(at, dates.length, width);
  const y = (amount) =>
    HEIGHT - MARGIN.bottom - ((amount - scale[0]) / (scale.at(-1) - scale[0])) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const labels = Math.min(dates.length, Math.max(2, Math.floor((width - MARGIN.left) / 110)));
  const labelled = Array.from({ length: labels }, (_, place) =>
    labels === 1 ? 0 : Math.round((place * (dates.length - 1)) / (labels - 1)),
  );
  const anchor = (at) => (dates.length === 1 ? "middle" : at === 0 ? "start" : at === dates.length - 1 ? "end" : "middle");
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
      drawn("text", { class: "tick", x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, (measure === "delay" ? long : short)(tick)),
    ]).flat(),
    labelled.map((at) => drawn("text", { class: "tick", x: x(at), y: HEIGHT - 6, "text-anchor": anchor(at) }, dates[at])),
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
  return [drawn("path", { class: `line l${order}`, d: path }), ...dots];
}

function ticksOf(values, fromZero) {
  let low = Math.min(...values.slice(0, 1));
  let high = low;
  for (const one of values) {
    low = Math.min(low, one);
    high = Math.max(high, one);
  }
  if (!Number.isFinite(low)) [low, high] = [0, 1];
  if (fromZero) low = Math.min(0, low);
  if (low === high) high = low + 1;
  const rough = (high - low) / TICKS;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const first = Math.floor(low / step);
  const last = Math.ceil(high / step);
  return Array.from({ length: last - first + 1 }, (_, place) => Number(((first + place) * step).toPrecision(12)));
}
