// The legend of the map: what its colours and patterns mean.

import { classOf } from "../completeness/states.js";
import { element } from "../dom.js";
import { shortChange } from "../format.js";
import { CHANGE_STEPS, stepClass } from "./scale.js";

/** Create the legend of a look of the map. */
export function legend({ measure, countries }, look) {
  const { title, steps } = LEGENDS[look.kind](measure, look);
  return element(
    "div",
    { class: "legends" },
    element("p", { class: "legend-title" }, title),
    element(
      "ul",
      { class: "legend colours", "aria-label": "Legend" },
      steps.map(([name, text]) => element("li", { class: "step" }, element("i", { class: name }), element("span", {}, text))),
      element("li", {}, element("i", { class: "c2 provisional" }), "provisional: cities are missing"),
      ...emptyStates(countries).map((state) => element("li", {}, element("i", { class: state ? classOf(state) : "none" }), state || "no data")),
    ),
  );
}

// The states of the days without data; "" while they are not known.
function emptyStates(countries) {
  const found = countries.flatMap(({ days }) => days.filter(({ standing }) => standing === "none").map(({ state }) => state ?? ""));
  return [...new Set(found)].sort();
}

const LEGENDS = {
  value(measure, { unit, scale }) {
    const { low, high, steps } = scale;
    const label = (place) => {
      if (!steps.length) return unit.show(low);
      if (place === 0) return `under ${unit.bound(steps[0])}`;
      const from = unit.bound(steps[place - 1]);
      return place === steps.length ? `${from} and more` : `${from}–${unit.bound(steps[place])}`;
    };
    return {
      title: unit.name ? `${measure.name}, in ${unit.name}` : measure.name,
      steps: [
        scale.hasZero && ["zero", "0"],
        scale.hasLow && ["low", `far below ${unit.show(low)}`],
        ...Array.from({ length: steps.length + 1 }, (_, place) => [stepClass(place, steps.length), label(place)]),
        scale.hasHigh && ["high", `far above ${unit.show(high)}`],
      ].filter(Boolean),
    };
  },
  within(measure, { unit }) {
    return {
      title: `${measure.name}, coloured within each country${unit.name ? `; numbers in ${unit.name}` : ""}`,
      steps: [
        ["low", "far below"],
        ["c0", "its lowest"],
        ["c3", "its middle"],
        ["c6", "its highest"],
        ["high", "far above its other days"],
      ],
    };
  },
  change(measure) {
    const label = (place) => {
      if (place === 0) return `under ${shortChange(CHANGE_STEPS[0])}`;
      if (place === 3) return "within ±5";
      return place < 3 ? `to ${shortChange(CHANGE_STEPS[place])}` : `from ${shortChange(CHANGE_STEPS[place - 1])}`;
    };
    return {
      title: `Change of ${measure.name.toLowerCase()}, in %`,
      steps: [
        ...Array.from({ length: CHANGE_STEPS.length + 1 }, (_, place) => [`d${place}`, label(place)]),
        ["unknown", "no earlier number"],
      ],
    };
  },
};
