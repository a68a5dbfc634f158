// The refused files of the range, with the reason and the keys of the stored objects.

import { quarantine } from "../api.js";
import { element } from "../dom.js";
import { bytes, count, instant, plural } from "../format.js";
import { problemNotice } from "../problems.js";

const LISTED = 100;

let onPage = null; // the displayed list, so that an unchanged list keeps its open details

/** Show the refused files of a range. */
export async function showQuarantine(range, signal) {
  const section = document.getElementById("refused");
  const place = section.querySelector("div");
  try {
    const { total, files } = await quarantine(range, LISTED, signal);
    const told = JSON.stringify([total, files]);
    if (told === onPage) return;
    onPage = told;
    section.hidden = files.length === 0;
    place.replaceChildren(
      element("p", {}, "Trips of these files are not counted. Earlier good files of the same cities still count. A file stays listed after it is corrected upstream."),
      element("ul", { class: "refused" }, files.map(item)),
      total > files.length ? element("p", {}, `These are the first ${count(files.length)} of ${count(total)}.`) : "",
    );
  } catch (problem) {
    if (problem.name === "AbortError") return;
    onPage = null;
    section.hidden = problem.status === 401 || problem.isOutage; // shown elsewhere
    place.replaceChildren(problemNotice(problem));
  }
}

function item(file) {
  const facts = {
    File: file.key,
    Report: file.report_key,
    Size: `${bytes(file.size_bytes)} (${count(file.size_bytes)} bytes)`,
    "SHA-256": file.sha256,
    Upstream: file.upstream_url,
    "First refused": instant(file.quarantined_at),
    Fetched: file.seen === 1 ? "once" : `${count(file.seen)} times, last ${instant(file.last_seen_at)}`,
  };
  return element(
    "li",
    {},
    element("strong", {}, `${file.date}, ${file.city_name || "city"} (${file.city_id})`),
    ` ${file.country}: ${file.reason}`,
    file.broke_off ? `; the download stopped early: ${file.broke_off}` : "",
    element(
      "details",
      {},
      element("summary", {}, file.bad_records ? `${plural(file.bad_records, "bad record")}${file.records ? ` of ${count(file.records)}` : ""}` : "Details"),
      file.reported.length
        ? element(
            "ul",
            {},
            file.reported.map((one) =>
              element(
                "li",
                {},
                `record ${count(one.record_number)}${one.field ? `, ${one.field}` : ""}: ${one.reason}`,
                one.value === null ? "" : ["; the value is ", element("code", {}, one.value)],
              ),
            ),
          )
        : "",
      element("dl", {}, Object.entries(facts).map(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]).flat()),
    ),
  );
}
