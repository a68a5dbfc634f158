// Takes the numbers elsewhere: the view as CSV, all figures of the range, and the call of the API.

import { hasKey, statsFile, statsPath } from "../api.js";
import { button, element } from "../dom.js";
import { problemNotice } from "../problems.js";

const KEPT_MS = 60_000;

/** Create the downloads of a model. `modelNow()` returns the current one. */
export function downloads(modelNow) {
  const place = element("div", { role: "status" });
  const save = async (type, ending) => {
    const { state } = modelNow();
    try {
      saveAs(await statsFile(state, type), `${nameOf(state)}.${ending}`);
      place.replaceChildren();
    } catch (problem) {
      place.replaceChildren(problemNotice(problem));
    }
  };
  const saveView = async () => {
    const { csvOf } = await import("./csv.js");
    const { state, countries, measure, comparison } = modelNow();
    saveAs(new Blob([csvOf(countries, measure, comparison)], { type: "text/csv" }), `${nameOf(state)}_view.csv`);
  };
  const copyCall = async () => {
    const call = callOf(modelNow().state);
    const copied = await navigator.clipboard?.writeText(call).then(() => true, () => false);
    place.replaceChildren(element("p", {}, copied ? "Copied: " : "Copy this call: ", element("code", {}, call)));
  };
  return element(
    "div",
    {},
    element(
      "p",
      { class: "downloads" },
      "This view: ",
      button("Download as CSV", saveView),
      button("Copy API call", copyCall),
      " All figures of the range: ",
      button("CSV", () => save("text/csv", "csv")),
      button("JSON", () => save("application/json", "json")),
      button("NDJSON", () => save("application/x-ndjson", "ndjson")),
      button("Parquet", () => save("application/vnd.apache.parquet", "parquet")),
    ),
    place,
  );
}

const nameOf = ({ country, from, to }) => [country || "countries", from, to].join("_");

/** The command that reads the numbers of a state from the API. It names a variable for the key, never the key. */
function callOf(state) {
  const key = hasKey() ? ` -H "X-API-Key: $TRIPFOLD_API_KEY"` : "";
  return `curl${key} '${location.origin}${statsPath(state)}'`;
}

function saveAs(blob, name) {
  const href = URL.createObjectURL(blob);
  element("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), KEPT_MS);
}
