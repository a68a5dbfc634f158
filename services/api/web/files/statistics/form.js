// The form of the range: its days, presets, the country, and what to compare with.

import { button } from "../dom.js";
import { byName, daysIn, moved } from "../format.js";
import { latestRange } from "../ranges.js";
import { COMPARISONS } from "./compare.js";

const PRESETS = { "Latest day": 1, "7 days": 7, "30 days": 30, "90 days": 90, "1 year": 365 };

const form = document.getElementById("range");
const presets = document.getElementById("presets");

/** Listen to the form. Calls `onchange(changes)` with a new range, country or comparison, and `onproblem` with an error. */
export function listenToForm(stateNow, { onchange, onproblem }) {
  const { elements } = form;
  for (const [value, text] of Object.entries({ "": "nothing", ...COMPARISONS })) elements.compare.append(new Option(text, value));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { from, to, country, compare } = Object.fromEntries(new FormData(form));
    if (from && to) onchange({ from, to, country, compare });
    else onproblem({ title: "A date is missing", message: "Enter a first and a last date." });
  });
  for (const select of [elements.country, elements.compare]) select.addEventListener("change", () => form.requestSubmit());
  for (const mover of form.querySelectorAll("[data-move]")) {
    mover.addEventListener("click", () => {
      const { from, to } = stateNow();
      const days = daysIn(from, to) * Number(mover.dataset.move);
      onchange({ from: moved(from, days), to: moved(to, days) });
    });
  }
  for (const [text, days] of Object.entries(PRESETS)) {
    presets.append(button(text, () => choosePreset(days, { onchange, onproblem }), { "data-days": days }));
  }
}

// A preset ends on the latest day that was requested, because later days have no data.
async function choosePreset(days, { onchange, onproblem }) {
  try {
    const { to } = await latestRange();
    onchange({ from: moved(to, 1 - days), to });
  } catch (problem) {
    onproblem(problem);
  }
}

/** Show a state in the form. */
export function showInForm({ from, to, country, compare }) {
  const { elements } = form;
  elements.from.value = from;
  elements.to.value = to;
  elements.compare.value = compare;
  for (const preset of presets.querySelectorAll("button")) {
    preset.setAttribute("aria-pressed", String(daysIn(from, to) === Number(preset.dataset.days)));
  }
  offer([], country);
}

/** Offer countries in the form, besides those that were offered before. */
export function offer(countries, chosen) {
  const { country: select } = form.elements;
  const known = new Map([...select.options].map((option) => [option.value, option.text]));
  for (const { slug, name } of countries) known.set(slug, name);
  if (chosen && !known.has(chosen)) known.set(chosen, chosen);
  known.delete("");
  const sorted = [...known].sort(([, one], [, other]) => byName(one, other));
  select.replaceChildren(new Option("All countries", ""), ...sorted.map(([slug, name]) => new Option(name, slug)));
  select.value = chosen;
}

/** The name of a country that was offered. */
export const nameOf = (slug) => [...form.elements.country.options].find(({ value }) => value === slug)?.text ?? slug;
