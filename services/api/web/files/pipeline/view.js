// The view of the pipeline: whether the services keep up, and what they achieve.

import { pipelineStatus } from "../api.js";
import { element, notice, scrollable } from "../dom.js";
import { bytes, count, plural } from "../format.js";
import { polling } from "../polling.js";
import { problemNotice } from "../problems.js";

const POLL_MS = 5_000;
const SERVICES = { planner: "lists the cities of a date", worker: "fetches and counts files", aggregate: "adds the numbers up" };
const MARKS = { idle: "✓", working: "…", stopped: "✕" };

const place = document.getElementById("pipeline-status");
const polled = polling(look, () => POLL_MS);

export const view = { path: "/pipeline", title: "Pipeline", place: "pipeline", open: polled.start, close: polled.stop };

async function look() {
  try {
    show(await pipelineStatus());
  } catch (problem) {
    place.replaceChildren(problemNotice(problem, look));
  }
  place.setAttribute("aria-busy", "false");
}

function show({ ready, faults, stages, throughput }) {
  place.replaceChildren(
    ...Object.entries(faults).map(([what, reason]) => notice("error", what === "s3" ? "S3 is unavailable" : "Kafka is unavailable", `${reason}.`)),
    element("p", { class: "health" }, ready ? "The API reaches S3 and Kafka." : "The API cannot do its work.", " ", stages ? verdict(stages) : ""),
    stages ? stagesTable(stages) : "",
    throughput ? tiles(throughput) : "",
  );
}

function verdict(stages) {
  const stopped = [...new Set(stages.filter(({ state }) => state === "stopped").map(({ service }) => service))];
  const lag = stages.reduce((sum, stage) => sum + stage.lag, 0);
  if (stopped.length) return `No consumer runs: ${stopped.join(", ")}. Start the service, or look at its log.`;
  return lag ? `${plural(lag, "record")} to process.` : "Everything is processed.";
}

const stagesTable = (stages) =>
  scrollable(
    element(
      "table",
      { class: "rows stages" },
      element("caption", {}, "Consumer groups, in the order of the data flow"),
      element("thead", {}, element("tr", {}, ["Service", "Topic", "State", "Consumers", "Lag", "Records per second"].map((name, at) => element("th", { scope: "col", class: at > 2 ? "figure" : null }, name)))),
      element("tbody", {}, stages.map(stageRow)),
    ),
  );

const stageRow = (stage) =>
  element(
    "tr",
    { class: stage.state },
    element("th", { scope: "row" }, stage.service, " ", element("small", {}, SERVICES[stage.service])),
    element("td", {}, stage.topic),
    element("td", { class: "state" }, element("span", { "aria-hidden": "true" }, `${MARKS[stage.state]} `), stage.state),
    figure(stage.consumers === null ? "unknown" : count(stage.consumers)),
    figure(count(stage.lag)),
    figure(stage.records_per_second === null ? "measuring" : count(stage.records_per_second)),
  );

const figure = (text) => element("td", { class: "figure" }, text);

function tiles(throughput) {
  const tile = (name, text) => element("div", {}, element("dt", {}, name), element("dd", {}, text));
  return element(
    "div",
    {},
    element("h3", {}, "Requests with progress in the last hour"),
    element(
      "dl",
      { class: "tiles" },
      tile("Ended", count(throughput.requests_ended)),
      tile("Open", count(throughput.requests_open)),
      tile("Cities done", count(throughput.cities_done)),
      tile("Trips counted", count(throughput.trips_done)),
      tile("Read", bytes(throughput.bytes_done)),
    ),
  );
}
