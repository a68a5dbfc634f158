// The files of the range that were refused: why, and where they lie.

import { quarantine } from "./api.js";
import { element, notice } from "./dom.js";
import { bytes, count, instant, plural } from "./format.js";

const LISTED = 100;

let onPage = null; // what is listed, so that a list that has not changed keeps its open details

/** Show the refused files of a range, of one country if it names one. */
export async function showQuarantine(range, signal) {
  const section = document.getElementById("refused");
  const place = section.querySelector("div");
  try {
    const { total, files } = await quarantine(range, LISTED, signal);
    const shown = range.country ? files.filter((file) => file.country === range.country) : files;
    const told = JSON.stringify([total, shown]);
    if (told === onPage) return;
    onPage = told;
    section.hidden = shown.length === 0;
    place.replaceChildren(
      element("p", {}, "No trip of these files is counted; what their cities reported before still is. A file stays listed after it was put right upstream."),
      element("ul", { class: "refused" }, shown.map(item)),
      total > files.length ? element("p", {}, `These are the first ${count(files.length)} of ${count(total)}.`) : "",
    );
  } catch (problem) {
    if (problem.name === "AbortError") return;
    onPage = null;
    section.hidden = problem.status === 401; // the statistics ask for the key
    place.replaceChildren(notice("error", problem.title ?? "That failed", problem.message));
  }
}

function item(file) {
  const facts = {
    File: file.key,
    "Report on it": file.report_key,
    Size: `${bytes(file.size_bytes)} (${count(file.size_bytes)} bytes)`,
    "SHA-256": file.sha256,
    Upstream: file.upstream_url,
    "First refused": instant(file.quarantined_at),
    Came: file.seen === 1 ? "once" : `${count(file.seen)} times, last ${instant(file.last_seen_at)}`,
  };
  return element(
    "li",
    {},
    element("strong", {}, `${file.date}, ${file.city_name || "city"} (${file.city_id})`),
    ` ${file.country}: ${file.reason}`,
    file.broke_off ? `; not all of it came: ${file.broke_off}` : "",
    element(
      "details",
      {},
      element("summary", {}, file.bad_records ? `${plural(file.bad_records, "bad record")}${file.records ? ` of ${count(file.records)}` : ""}` : "Where it lies"),
      file.reported.length
        ? element(
            "ul",
            {},
            file.reported.map((one) =>
              element(
                "li",
                {},
                `record ${count(one.record_number)}${one.field ? `, ${one.field}` : ""}: ${one.reason}`,
                one.value === null ? "" : [", but it is ", element("code", {}, one.value)],
              ),
            ),
          )
        : "",
      element("dl", {}, Object.entries(facts).map(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]).flat()),
    ),
  );
}
