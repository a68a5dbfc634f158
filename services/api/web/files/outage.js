// One message for the whole page while the service, or what it depends on, is down. The page goes on by itself when it is back.

import { connection } from "./api.js";
import { button, notice } from "./dom.js";
import { reopen } from "./views.js";

const FIRST_WAIT_MS = 2_000;
const WAIT_MAX_MS = 30_000;

const place = document.getElementById("outage");

let isDown = false;
let wait = FIRST_WAIT_MS;
let timer = null;

/** Show outages of the API, and open the view again when it responds. */
export function watchOutages() {
  connection.addEventListener("outage", ({ detail }) => begin(detail));
  connection.addEventListener("response", end);
  addEventListener("online", again);
  document.addEventListener("visibilitychange", again);
}

function begin(problem) {
  if (!isDown) place.replaceChildren(notice("error", problem.title, `${problem.message} The page tries again by itself.`, button("Try now", again)));
  isDown = true;
  timer ??= setTimeout(again, wait);
}

function again() {
  if (!isDown || document.hidden) return;
  clearTimeout(timer);
  timer = null;
  wait = Math.min(wait * 2, WAIT_MAX_MS);
  reopen();
}

function end() {
  if (!isDown) return;
  isDown = false;
  clearTimeout(timer);
  timer = null;
  wait = FIRST_WAIT_MS;
  place.replaceChildren();
  reopen(); // parts that failed before
}
