// Notices for errors of the API, each with its remedy.

import { keepKey } from "./api.js";
import { button, element, notice } from "./dom.js";

/** Create the notice for an error. `again` repeats what failed. */
export function problemNotice(problem, again) {
  if (!problem.title) console.error(problem);
  const remedy = problem.status === 401 ? keyForm() : again && button("Try again", again);
  return notice("error", problem.title ?? "The request failed", problem.message, remedy);
}

function keyForm() {
  const key = element("input", { type: "password", name: "key", autocomplete: "off", required: true });
  return element(
    "form",
    {
      class: "controls",
      onsubmit: (event) => {
        event.preventDefault();
        keepKey(key.value.trim());
        location.reload();
      },
    },
    element("label", {}, "API key", key),
    element("button", { class: "primary" }, "Use this key"),
  );
}
