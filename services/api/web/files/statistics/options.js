// How the statistics are shown: the measure, the colours, the order, and a search for countries.

import { element } from "../dom.js";
import { MEASURES, hasRate } from "./measures.js";
import { ORDERS } from "./rows.js";

/** Create the options of a state. Calls `onchange(changes)` with what the reader changed. */
export function options(state, { isSingleDay, onchange }) {
  const rate = element("input", {
    type: "checkbox",
    checked: state.rate !== "",
    disabled: !hasRate(state.measure),
    onchange: () => onchange({ rate: rate.checked ? "1000" : "" }),
  });
  const choose = (measure) => {
    rate.disabled = !hasRate(measure);
    onchange({ measure });
  };
  return element(
    "form",
    { class: "options", onsubmit: (event) => event.preventDefault() },
    element(
      "fieldset",
      { class: "measures" },
      element("legend", { class: "unseen" }, "Measure"),
      Object.entries(MEASURES).map(([key, { name }]) =>
        element(
          "label",
          {},
          element("input", { type: "radio", name: "measure", value: key, checked: key === state.measure, onchange: () => choose(key) }),
          element("span", {}, name),
        ),
      ),
    ),
    element("label", { class: "check" }, rate, "per 1,000 departures"),
    element(
      "div",
      { class: "controls" },
      state.country ? null : rowControls(state, isSingleDay, onchange),
      !isSingleDay && state.compare ? choice("Map", "map", { "": "Values", change: "Change in %" }, state.map, onchange) : null,
    ),
  );
}

// Which countries are shown, in which order and colours; a single country has no choice.
function rowControls(state, isSingleDay, onchange) {
  const find = element("input", { type: "search", name: "find", value: state.find, oninput: () => onchange({ find: find.value }) });
  return [
    element("label", {}, "Find a country", find),
    choice("Sort by", "sort", ordersOf(state), state.sort || (isSingleDay ? "value" : "name"), onchange),
    isSingleDay ? null : choice("Colours", "colours", { "": "Across countries", within: "Within each country" }, state.colours, onchange),
  ];
}

function ordersOf(state) {
  const { change, ...others } = ORDERS;
  return state.compare ? { ...others, change } : others;
}

function choice(label, key, texts, chosen, onchange) {
  const select = element("select", { name: key, onchange: () => onchange({ [key]: select.value }) });
  for (const [value, text] of Object.entries(texts)) select.append(new Option(text, value, false, value === chosen));
  return element("label", {}, label, select);
}
