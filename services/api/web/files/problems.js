// Notices for errors of the API, each with its remedy.

import { button, element, notice } from "./dom.js";
import { keyForm, openKeyDialog } from "./key.js";

/**
 * Create the notice for an error. `again` repeats what failed. An outage is shown once for the whole page, so only a short
 * text stands here.
 */
export function problemNotice(problem, again) {
  if (problem.isOutage) return element("p", { class: "none-text error" }, "Waiting for the service…");
  if (!problem.title) console.error(problem);
  const remedy = { 401: keyForm, 403: () => button("Use another key", openKeyDialog) }[problem.status]?.() ?? (again && button("Try again", again));
  return notice("error", problem.title ?? "This does not work", problem.title ? problem.message : "Load the page again.", remedy);
}
