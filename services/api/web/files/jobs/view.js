// The view of jobs: what is processed now, what was processed, and which files were refused.

import { latestRequests } from "../api.js";
import { requestedRange, todayInUtc } from "../ranges.js";
import { moved } from "../format.js";
import { watchBackfills } from "./backfills.js";
import { showQuarantine } from "./quarantine.js";
import { watchRequests } from "./requests.js";

const LISTED = 20;

let watches = null; // made when the view is opened first
let loading = null;

export const view = { path: "/jobs", title: "Jobs", place: "jobs", open, close };

function open({ from, to, country }) {
  loading?.abort();
  loading = new AbortController();
  if (!watches) {
    const backfills = watchBackfills();
    watches = [backfills, watchRequests({ onasked: backfills.start })];
    document.addEventListener("visibilitychange", () => loading && each(document.hidden ? "stop" : "start"));
  }
  each("start");
  fill(from, to, country, loading.signal);
}

function close() {
  loading.abort();
  loading = null;
  each("stop");
}

const each = (step) => watches.forEach((watch) => watch[step]());

async function fill(from, to, country, signal) {
  const asking = document.getElementById("ask").elements;
  let range = { from, to };
  if (from && to) {
    asking.from.value = from;
    asking.to.value = to;
  } else {
    const requests = await latestRequests(LISTED).catch(() => []);
    if (signal.aborted) return;
    range = requestedRange(requests, todayInUtc());
    asking.from.value ||= moved(range.to, requests.length ? 1 : 0);
    asking.to.value ||= asking.from.value;
  }
  showQuarantine({ ...range, country }, signal);
}
