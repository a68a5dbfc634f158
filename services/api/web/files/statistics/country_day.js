// The dialog with the cities of a country-day and the source of each contribution.

import { ledger } from "../api.js";
import { button, element, notice, scrollable } from "../dom.js";
import { problemNotice } from "../problems.js";
import { byName, bytes, count, delay, instant } from "../format.js";
import { urlOf } from "../views.js";
import { completeness } from "./stats.js";

const REMEDIES = {
  process: "Process this date",
  retry: "Retry its failed cities",
  wait: "See how far it is",
  repair: "See what is damaged",
};

const STANDINGS = {
  reported: "counted",
  left: "counted; no longer in the upstream's list",
  missing: "missing",
  retracted: "moved to another country",
};

/** Open the dialog that shows a country-day. */
export function openCountryDay(country, day) {
  const dialog = document.getElementById("country-day");
  const cities = element("div", { "aria-busy": "true" }, element("p", { class: "loading" }, "Reading the cities…"));
  const content = element(
    "div",
    { class: "content" },
    element(
      "header",
      {},
      element("h2", { id: "country-day-title" }, `${country.name}, ${day.date}`),
      button("Close", () => dialog.close(), { "aria-keyshortcuts": "Escape" }),
    ),
    element("p", { class: `${day.standing}-text` }, `This day is ${completeness(day)}.`),
    day.action ? element("p", {}, day.standing === "none" ? "" : `${day.reason}. `, element("a", { href: urlOf("/completeness", { from: day.date, to: day.date }) }, REMEDIES[day.action])) : "",
    cities,
  );
  dialog.replaceChildren(content);
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close(); // a click on the backdrop; the content has elements of its own
  };
  for (const link of content.querySelectorAll("a")) link.addEventListener("click", () => dialog.close());
  dialog.showModal();
  read(cities, country, day);
}

// The API sorts cities by their ids as texts; here they are sorted as people do.
const byCity = (one, other) => byName(one.city_name, other.city_name) || byName(one.city_id, other.city_id);

async function read(place, country, day, { next = null, body = null, cities = [] } = {}) {
  try {
    const page = await ledger(country.slug, day.date, next);
    if (!body) {
      body = element("tbody");
      place.replaceChildren(page.cities.length ? table(body) : notice("empty", "This day has no cities"));
    }
    cities.push(...page.cities);
    body.replaceChildren(...cities.toSorted(byCity).map(row));
    if (page.next) {
      const more = button("Show more cities", () => {
        more.remove();
        read(place, country, day, { next: page.next, body, cities });
      });
      place.append(more);
    }
  } catch (problem) {
    const isMissing = problem.status === 404;
    const unknown = day.state ? "" : notice("empty", "This day has not been processed yet", "Process its date to see its cities here.");
    place.append(isMissing ? unknown : problemNotice(problem));
  } finally {
    place.querySelector(".loading")?.remove();
    place.setAttribute("aria-busy", "false");
  }
}

const table = (body) =>
  scrollable(
    element(
      "table",
      { class: "rows" },
      element("caption", { class: "unseen" }, "Cities"),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          ["City", "Standing", "Average delay", "Passengers", "Departures", "Accidents", "Source"].map((name, place) =>
            element("th", { scope: "col", class: place > 1 && place < 6 ? "figure" : null }, name),
          ),
        ),
      ),
      body,
    ),
  );

function row(city) {
  const added = city.contribution;
  const figure = (text) => element("td", { class: "figure" }, text);
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, city.city_name || "(name not known yet)", element("small", {}, ` id ${city.city_id}`)),
    standing(city),
    figure(added?.trips ? delay(added.delay_total_ms / added.trips / 1000) : "–"),
    figure(added ? count(added.passengers) : "–"),
    figure(added ? count(added.trips) : "–"),
    figure(added ? count(added.accidents) : "–"),
    element("td", {}, city.provenance ? provenance(city.provenance) : "no file was ingested"),
  );
}

function standing(city) {
  const text = STANDINGS[city.standing] ?? city.standing;
  const plain = city.standing === "reported" && !city.suspicious;
  const suspicious = city.suspicious ? element("small", {}, ` suspicious: ${city.suspicious}`) : "";
  return element("td", { class: plain ? null : "provisional-text" }, text, suspicious);
}

function provenance(from) {
  const facts = {
    Ingested: instant(from.ingested_at),
    Upstream: from.upstream_url,
    "Raw file": from.raw_key,
    Size: `${bytes(from.size_bytes)} (${count(from.size_bytes)} bytes)`,
    "SHA-256": from.sha256,
    "Upstream's ETag": from.etag ?? "none",
    "Changed upstream": from.last_modified ?? "unknown",
    Revision: String(from.revision),
    "Plan revision": String(from.plan_revision),
    "Parsed with rules": `version ${from.rule_version}`,
    Request: from.request_id,
  };
  return element(
    "details",
    {},
    element("summary", {}, `${bytes(from.size_bytes)}, ${instant(from.ingested_at)}`),
    element("dl", {}, Object.entries(facts).map(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]).flat()),
  );
}
