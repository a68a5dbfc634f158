// The client of the REST API.

import { yieldToBrowser } from "./dom.js";

const PARALLEL_DATES = 4;

/** An error of the API or the network, in words for the reader. */
export class Problem extends Error {
  constructor(title, detail, { status = 0 } = {}) {
    super(detail);
    this.title = title;
    this.status = status;
    this.isOutage = false;
  }
}

const KEPT = "tripfold-key";
const UNAVAILABLE = [502, 503, 504];

/** Store an API key until this window is closed. */
export const keepKey = (key) => sessionStorage.setItem(KEPT, key);
export const forgetKey = () => sessionStorage.removeItem(KEPT);
export const hasKey = () => sessionStorage.getItem(KEPT) !== null;

/** Dispatches `outage` events, whose `detail` is the problem, and `response` events. `outage.js` shows an outage for the whole page. */
export const connection = new EventTarget();

function outage(problem) {
  problem.isOutage = true;
  connection.dispatchEvent(new CustomEvent("outage", { detail: problem }));
  return problem;
}

function headers(accept) {
  const key = sessionStorage.getItem(KEPT);
  return { Accept: accept, ...(key && { "X-API-Key": key }) };
}

function keyRefused(response) {
  return hasKey()
    ? new Problem("This API key is unknown", "It is mistyped or revoked. Enter a valid key.", response)
    : new Problem("An API key is needed", "Ask the operator of this service, who creates keys with `tripfold api-key`.", response);
}

// An action that fails shows its own error; a page that cannot read anything shows one for all its parts.
async function checkedFetch(path, accept, { etag, ...options } = {}) {
  const isReading = !options.method;
  let response;
  try {
    response = await fetch(path, { headers: { ...headers(accept), ...(etag && { "If-None-Match": etag }) }, ...options });
  } catch (error) {
    throw unreachable(error, isReading);
  }
  const isDown = isReading && UNAVAILABLE.includes(response.status);
  if (isReading && !isDown) connection.dispatchEvent(new Event("response"));
  if (response.ok || (etag && response.status === 304)) return response;
  if (response.status === 401) throw keyRefused(response);
  const body = await response.json().catch(() => null);
  const problem = new Problem(body?.title ?? `Status ${response.status}`, body?.detail ?? "The service gave no reason.", response);
  throw isDown ? outage(problem) : problem;
}

/** The problem of a request without a response. While something is read, it is an outage. */
export function unreachable(error, isReading = true) {
  if (error.name === "AbortError") return error;
  const problem = new Problem("The service cannot be reached", "Check that it runs and that this machine is connected to it.");
  return isReading ? outage(problem) : problem;
}

async function fetched(path, options = {}) {
  const response = await checkedFetch(path, "application/json", options);
  return response.json().catch((error) => {
    throw unreachable(error, !options.method);
  });
}

async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** The path of the detailed statistics of a range, or of one country in it. */
export const statsPath = ({ from, to, country }) =>
  `/country-stats?${new URLSearchParams({ from, to, detail: "full", ...(country && { country }) })}`;

/** The statistics of a range in another media type, as a file. */
export const statsFile = async (range, type) => (await checkedFetch(statsPath(range), type)).blob();

/**
 * Read the detailed country-days of a range. Calls `ondays` with sorted batches as they arrive, and returns the ETag. If it
 * equals `etag`, nothing has changed, and `ondays` is not called.
 */
export async function countryStats(range, { signal, etag }, ondays) {
  const response = await checkedFetch(statsPath(range), "application/x-ndjson", { signal, etag });
  if (response.status === 304) return etag;
  let rest = "";
  try {
    for await (const piece of pieces(response)) {
      const end = piece.lastIndexOf("\n");
      if (end >= 0) ondays(JSON.parse(`[${(rest + piece.slice(0, end)).replaceAll("\n", ",")}]`));
      rest = end >= 0 ? piece.slice(end + 1) : rest + piece;
      await yieldToBrowser();
    }
  } catch (error) {
    throw error instanceof SyntaxError ? error : unreachable(error);
  }
  if (rest) throw new Problem("The statistics are incomplete", "The connection ended early. Try again.");
  return response.headers.get("ETag");
}

/** The first `limit` refused files of a range of dates, and the number of all. */
export const quarantine = ({ from, to }, limit, signal) =>
  fetched(`/quarantine?${new URLSearchParams({ from, to, limit })}`, { signal });

/** A page of a country-day's cities. `next` is the path from the previous page. */
export const ledger = (country, date, next) =>
  fetched(next ?? `/country-stats/${encodeURIComponent(country)}/${date}?limit=1000`);

export const latestRequests = async (limit) => (await fetched(`/process-requests?limit=${limit}`)).requests;
export const cancel = (id) => fetched(`/process-requests/${id}`, { method: "DELETE" });
export const retry = (id) => fetched(`/process-requests/${id}/retry`, { method: "POST" });
export const request = (id) => fetched(`/process-requests/${id}`);

/** The JSON of a path, such as the `next` of a list. */
export const page = (path) => fetched(path);

/** Request the processing of a date, or of a range of dates as a backfill. */
export const ask = (from, to) =>
  fetched(
    from === to
      ? `/process-request?${new URLSearchParams({ date: from })}`
      : `/backfills?${new URLSearchParams({ from, to, only: "all", max_parallel: PARALLEL_DATES })}`,
    { method: "POST" },
  );

export const backfill = (id) => fetched(`/backfills/${id}`);
export const cancelBackfill = (id) => fetched(`/backfills/${id}`, { method: "DELETE" });

/** Let a backfill `pause`, `resume` or `retry`. */
export const changeBackfill = (id, change) => fetched(`/backfills/${id}/${change}`, { method: "POST" });
export const schedules = async () => (await fetched("/schedules")).schedules;

// A response with an ETag. The body is null if `etag` is current.
async function revalidated(path, { signal, etag }) {
  const response = await checkedFetch(path, "application/json", { signal, etag });
  return response.status === 304 ? { etag, body: null } : { etag: response.headers.get("ETag"), body: await response.json() };
}

/** How complete a range of dates is: `{etag, body}`; the body is null if nothing has changed since `etag`. */
export const completeness = ({ from, to }, options) => revalidated(`/country-completeness?${new URLSearchParams({ from, to })}`, options);

/** The cities that a country-day lacks. */
export const missingCities = (country, date) => fetched(`/country-completeness/${encodeURIComponent(country)}/${date}`);

/** Request the dates of a range that lack data: a date, or a backfill. */
export const askMissing = (from, to) =>
  from === to ? ask(from, to) : fetched(`/backfills?${new URLSearchParams({ from, to, only: "missing", max_parallel: PARALLEL_DATES })}`, { method: "POST" });

export const pipelineStatus = () => fetched("/pipeline-status");

/** The name and the scopes of the key in use. */
export const access = () => fetched("/access");
